"""Tokenizers: what they encode, and the hash that tells them apart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from robustgate.lm.tokenizer import (
    BOS,
    EOS,
    encode,
    load_tokenizer,
    special_ids,
    tokenizer_sha256,
    train_tokenizer,
)

from .conftest import make_documents


def test_every_text_survives(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    text = f"  tabs\tand {EOS} \u00fcml\u00e4ut \U0001f600\n\n"
    tokens = encode(tokenizer, [text, "b"])
    assert tokens.offsets.tolist() == [0, len(tokens.ids) - 3, len(tokens.ids)]
    first = tokens.ids[: tokens.offsets[1]].tolist()
    bos, eos = special_ids(tokenizer)
    assert (first[0], first[-1]) == (bos, eos)
    # The text of the EOS token is text: its number stands at the end alone.
    assert first.count(eos) == 1
    assert tokenizer.decode(first[1:-1]) == text
    assert tokens.gold_offsets.tolist() == [0, len(first) - 1, len(first) + 1]
    assert torch.equal(tokens.documents(1, 2).ids, tokens.ids[tokens.offsets[1] :])


def test_a_prompt_starts_with_bos(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    assert tokenizer("def main(")["input_ids"][0] == tokenizer.convert_tokens_to_ids(BOS)


def test_training_depends_on_nothing_else(tokenizer_path: Path, tmp_path: Path) -> None:
    """Another process, with another hash seed, makes the same tokenizer."""
    documents = [*make_documents("code", 40), *make_documents("prose", 40)]
    program = (
        "import json, sys; from robustgate.lm.tokenizer import *; "
        "print(tokenizer_sha256(train_tokenizer(json.load(sys.stdin), 300, sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "again"],
        input=json.dumps(documents),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == tokenizer_sha256(load_tokenizer(tokenizer_path))


def change(path: Path, tmp_path: Path, edit: Callable[[dict], object]) -> str:
    """Return the hash of a tokenizer after an edit to its ``tokenizer.json``."""
    copy = tmp_path / "changed"
    copy.mkdir(exist_ok=True)
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    state = json.loads((copy / "tokenizer.json").read_text())
    edit(state)
    (copy / "tokenizer.json").write_text(json.dumps(state))
    return tokenizer_sha256(load_tokenizer(copy))


def test_hash_ignores_what_does_not_matter(tokenizer_path: Path, tmp_path: Path) -> None:
    own = tokenizer_sha256(load_tokenizer(tokenizer_path))

    def reorder(state: dict) -> None:
        state["model"]["vocab"] = dict(sorted(state["model"]["vocab"].items()))
        state["truncation"] = {
            "direction": "Right",
            "max_length": 8,
            "strategy": "LongestFirst",
            "stride": 0,
        }

    assert change(tokenizer_path, tmp_path, reorder) == own


def test_hash_sees_every_part(tokenizer_path: Path, tmp_path: Path) -> None:
    def swap_vocabulary(state: dict) -> None:
        vocabulary = state["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edits: list[Callable[[dict], object]] = [
        swap_vocabulary,
        lambda state: state["model"]["merges"].reverse(),
        lambda state: state.update(normalizer={"type": "Lowercase"}),
        lambda state: state["pre_tokenizer"].update(add_prefix_space=True),
        lambda state: state["added_tokens"][2].update(lstrip=True),
    ]
    hashes = {change(tokenizer_path, tmp_path, edit) for edit in edits}
    hashes.add(tokenizer_sha256(load_tokenizer(tokenizer_path)))
    assert len(hashes) == len(edits) + 1


def test_errors_name_the_folder_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size: expected at least 259.*got 100"):
        train_tokenizer(["a"], 100, tmp_path / "small")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there: already exists; delete it first"):
        train_tokenizer(["a"], 300, tmp_path / "there")
    with pytest.raises(
        ValueError, match=r"there: no readable tokenizer .*save_pretrained\(folder\)"
    ):
        load_tokenizer(tmp_path / "there")
    assert [child.name for child in tmp_path.iterdir()] == ["there"]


def test_documents_start_with_eos_where_there_is_no_bos(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    eos = tokenizer.eos_token_id
    tokenizer.bos_token = None
    assert encode(tokenizer, ["a"]).ids[0] == eos
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token; set eos_token"):
        encode(tokenizer, ["a"])

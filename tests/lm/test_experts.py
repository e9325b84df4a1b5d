"""Expert sets: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from robustgate.lm.checkpoint import checkpoint_sha256
from robustgate.lm.experts import ExpertSet
from robustgate.lm.tokenizer import train_tokenizer

Make = Callable[..., Path]


@pytest.fixture
def copy(experts_path: Path, tmp_path: Path) -> Path:
    """A copy of the expert ``code`` to spoil."""
    return Path(shutil.copytree(experts_path / "code", tmp_path / "copy"))


def test_a_folder_of_checkpoints(experts_path: Path) -> None:
    experts = ExpertSet.open(experts_path)
    assert experts.names == ("code", "prose")
    assert (len(experts), experts.vocab_size, experts.context) == (2, 300, 32)
    assert experts.path("code") == experts_path / "code"
    assert experts.sha256("code") != experts.sha256("prose")
    model = experts.load("code")
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert experts.load("code", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert "ExpertSet([code, prose]" in repr(experts)


def test_other_ways_to_name_them(experts_path: Path) -> None:
    code, prose = experts_path / "code", experts_path / "prose"
    assert ExpertSet.open(str(code)).names == ("code",)
    assert ExpertSet.open([prose, code]).names == ("prose", "code")
    assert ExpertSet.open({"a": code, "b": code}).names == ("a", "b")


def test_add_and_remove(experts_path: Path) -> None:
    experts = ExpertSet.open(experts_path / "code")
    experts.add("prose", experts_path / "prose")
    experts.remove("code")
    assert experts.names == ("prose",)
    with pytest.raises(ValueError, match="no expert is named 'code'; there are: prose"):
        experts.remove("code")


def test_context_is_the_shortest_and_padded_vocabularies_pass(
    experts_path: Path, tmp_path: Path, make_checkpoint: Make
) -> None:
    padded = make_checkpoint(tmp_path / "padded", context=16, vocab_size=320)
    experts = ExpertSet.open([experts_path, padded])
    assert (experts.context, experts.vocab_size) == (16, 300)


def test_hash_is_of_the_content(copy: Path, experts_path: Path) -> None:
    own = checkpoint_sha256(experts_path / "code")
    config = json.loads((copy / "config.json").read_text())
    config["transformers_version"] = "0"
    (copy / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    index = {name: f"part{number % 2}.safetensors" for number, name in enumerate(names)}
    for part in set(index.values()):
        save_file({name: weights[name] for name in names if index[name] == part}, copy / part)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert checkpoint_sha256(copy) == own

    config["rms_norm_eps"] = 1e-3
    (copy / "config.json").write_text(json.dumps(config))
    other_config = checkpoint_sha256(copy)
    weights[names[0]][0] += 1e-3
    save_file({n: weights[n] for n in names if index[n] == index[names[0]]}, copy / index[names[0]])
    assert len({own, other_config, checkpoint_sha256(copy)}) == 3

    (copy / "part1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part1\.safetensors: missing; copy the whole"):
        ExpertSet.open(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"copy: pytorch_model\.bin is a pickle.*save_pretrained"):
        ExpertSet.open(copy)


def test_missing_and_truncated_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    for size in (0, 5, 200, len(content) - 1):
        weights.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors: truncated or damaged"):
            ExpertSet.open(copy)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: missing"):
        ExpertSet.open(copy)


def test_weights_that_do_not_fit_the_configuration(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights of the model are not.*model\.norm\.weight"):
        ExpertSet.open(copy).load("copy")
    save_file({**weights, "model.norm.weight": norm[:7].clone()}, copy / "model.safetensors")
    with pytest.raises(ValueError, match="copy: the weights"):
        ExpertSet.open(copy).load("copy")


def test_not_a_checkpoint(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        ExpertSet.open(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: neither a checkpoint"):
        ExpertSet.open(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"empty: no config\.json"):
        ExpertSet.open({"x": tmp_path / "empty"})
    with pytest.raises(ValueError, match="paths: expected at least one checkpoint"):
        ExpertSet.open([])
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        ExpertSet.open(copy)
    (copy / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ValueError, match=r"config\.json: not a usable configuration"):
        ExpertSet.open(copy)


def test_not_a_language_model(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="copy: model type 'vit' is no causal language model"):
        ExpertSet.open(copy)


def test_code_in_a_checkpoint_never_runs(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(
        ValueError, match="type 'mine' needs the code in this folder, which is not run"
    ):
        ExpertSet.open(copy)
    assert not (tmp_path / "ran").exists()


def test_duplicate_names(experts_path: Path, tmp_path: Path) -> None:
    other = shutil.copytree(experts_path / "prose", tmp_path / "code")
    with pytest.raises(ValueError, match=r"two experts are named 'code'.*mapping from names"):
        ExpertSet.open([experts_path / "code", other])


def test_another_tokenizer_is_refused(experts_path: Path, copy: Path, tmp_path: Path) -> None:
    other = train_tokenizer(["other words altogether"] * 3, 280, tmp_path / "tokenizer")
    other.save_pretrained(copy)
    with pytest.raises(ValueError, match="differ in: vocabulary, merges") as caught:
        ExpertSet.open([experts_path / "code", experts_path / "prose", copy.parent / "copy"])
    assert str(experts_path / "code") in str(caught.value)
    assert str(copy) in str(caught.value)


def test_a_model_too_narrow_for_the_tokenizer(tmp_path: Path, experts_path: Path) -> None:
    broken = Path(shutil.copytree(experts_path / "code", tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    config["vocab_size"] = 290
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="broken: the model has 290 outputs, fewer than the 300"):
        ExpertSet.open(broken)

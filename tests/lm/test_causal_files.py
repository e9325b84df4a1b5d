"""A modular model on disk: by reference, bundled, and through the doors of transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from causal_models import BOS, VOCAB, make_experts, make_model, make_prompts
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, pipeline

from robustgate.lm import ExpertSet, LogProbStore, ModularForCausalLM, score
from robustgate.lm.gates.fit import fit
from robustgate.lm.gates.spec import Network
from robustgate.lm.modular import ModularModel
from robustgate.lm.store.features import FeatureSpec

pytestmark = pytest.mark.usefixtures("no_grad")


def make_ids(rows=2, tokens=9):
    return make_prompts(rows, tokens).where(make_prompts(rows, tokens) != BOS, 0)


def test_from_modular_takes_experts_prior_and_tokenizer(modular_path, experts_path):
    model = ModularForCausalLM.from_modular(modular_path)
    fitted = ModularModel.load(modular_path)
    experts = ExpertSet.open(experts_path)
    torch.testing.assert_close(model.gate.log_prior.exp(), fitted.prior)
    assert model.config.names == fitted.names
    assert model.config.vocab_size == experts.vocab_size
    assert model.config.max_position_embeddings == experts.context
    assert model.config.bos_token_id == experts.tokenizer.bos_token_id
    assert model.generation_config.eos_token_id == experts.tokenizer.eos_token_id
    again = ModularForCausalLM.from_modular(fitted, dtype=torch.bfloat16, top_k=1)
    assert {parameter.dtype for parameter in again.experts.parameters()} == {torch.bfloat16}
    assert again.gate.log_prior.dtype == torch.float64
    assert again.config.top_k_experts == 1


def test_it_scores_documents_as_the_store_did(modular_path, corpora, tmp_path):
    """Offline log-probabilities and gate, online model: the same mixture."""
    compare_with_store(modular_path, corpora)


def test_a_learned_gate_reads_online_what_the_store_kept(modular_path, corpora, tmp_path):
    """All features, at the same tokens: a fitted token gate gives the same mixture."""
    features = FeatureSpec(entropy=True, top=True, agreement=True, jsd=True, hidden=3)
    experts = ModularModel.load(modular_path).open_experts()
    shutil.copytree(modular_path.parent / "store", tmp_path / "store")
    store = score(experts, corpora, tmp_path / "store", features=features, progress=False)
    with torch.enable_grad():
        fitted = fit(
            store,
            tmp_path / "modular",
            gate="token",
            network=Network("mlp", width=8),
            experts=experts,
            features=features,
            steps=40,
            progress=False,
        )
    assert fitted.features == features
    assert fitted.gate().head.weight.abs().max() > 0  # it does depend on them
    compare_with_store(tmp_path / "modular", corpora)
    model = ModularForCausalLM.from_modular(tmp_path / "modular")
    model.save_pretrained(tmp_path / "saved")
    again = ModularForCausalLM.from_pretrained(tmp_path / "saved")
    ids = make_ids()
    assert torch.equal(again(ids).logits, model(ids).logits)
    found = model.generate(ids, do_sample=False, max_new_tokens=8)
    assert torch.equal(
        model.generate(ids, do_sample=False, max_new_tokens=8, use_cache=False), found
    )


def compare_with_store(path, corpora):
    """Documents that fit the context: the model's log-probabilities are those of store and gate."""
    from robustgate.lm.tokenizer import encode

    model = ModularForCausalLM.from_modular(path)
    fitted = ModularModel.load(path)
    experts = fitted.open_experts()
    store = LogProbStore.open(path.parent / "store")
    compared = 0
    for corpus in corpora:
        tokens = encode(experts.tokenizer, corpus.documents)
        offsets = store.offsets(corpus.name)
        scores = store.token_log_probs(corpus.name, experts.names)
        known = None
        if fitted.kind == "token":
            known = store.context_features(corpus.name, fitted.features, experts.names)
        for document in range(len(corpus.documents)):
            ids = tokens.ids[tokens.offsets[document] : tokens.offsets[document + 1]]
            if len(ids) > experts.context:
                continue
            rows = slice(int(offsets[document]), int(offsets[document + 1]))
            given = {} if known is None else {"context": known[rows]}
            expected = fitted.gate().log_prob(scores[rows], **given).double()
            found = model(ids[None]).logits[0, :-1].gather(1, ids[1:, None])[:, 0]
            # float32 logits of size 10, twice
            torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize("bundle", [False, True])
def test_a_reload_has_the_same_bits(modular_path, tmp_path, bundle):
    model = ModularForCausalLM.from_modular(modular_path, top_k=1)
    model.save_pretrained(tmp_path / "saved", bundle=bundle)
    again = ModularForCausalLM.from_pretrained(tmp_path / "saved")
    ids = make_ids()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.top_k_experts == 1
    assert again.config.names == model.config.names
    assert not any(path.suffix in (".bin", ".pt") for path in (tmp_path / "saved").rglob("*"))
    again.save_pretrained(tmp_path / "twice", bundle=bundle)
    twice = ModularForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(twice(ids).logits, model(ids).logits)


def test_a_bundle_can_be_moved_and_saved_in_place(modular_path, tmp_path):
    model = ModularForCausalLM.from_modular(modular_path)
    model.save_pretrained(tmp_path / "saved", bundle=True)
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = ModularForCausalLM.from_pretrained(tmp_path / "moved")
    again.save_pretrained(tmp_path / "moved", bundle=True)
    third = ModularForCausalLM.from_pretrained(tmp_path / "moved")
    assert torch.equal(third(make_ids()).logits, model(make_ids()).logits)
    paths = [entry["path"] for entry in read(tmp_path / "moved")["experts"]]
    assert paths == ["experts/code", "experts/prose"]


def read(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_reference_knows_its_expert_by_hash(modular_path, experts_path, tmp_path):
    shutil.copytree(experts_path, tmp_path / "experts")
    shutil.copytree(modular_path, tmp_path / "modular")
    manifest = json.loads((tmp_path / "modular" / "manifest.json").read_text())
    for entry in manifest["experts"]:
        entry["path"] = str(tmp_path / "experts" / entry["name"])
    (tmp_path / "modular" / "manifest.json").write_text(json.dumps(manifest))
    model = ModularForCausalLM.from_modular(tmp_path / "modular")
    model.save_pretrained(tmp_path / "saved")
    assert [entry["path"] for entry in read(tmp_path / "saved")["experts"]] == [
        "../experts/code",
        "../experts/prose",
    ]
    shutil.copytree(experts_path / "prose", tmp_path / "experts" / "code", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="expert 'code' has changed since the model was saved"):
        ModularForCausalLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="expert 'code' has changed since it was loaded"):
        model.save_pretrained(tmp_path / "bundle", bundle=True)
    assert not (tmp_path / "bundle" / "config.json").exists()
    shutil.rmtree(tmp_path / "experts" / "code")
    with pytest.raises(FileNotFoundError, match="code: no such folder"):
        ModularForCausalLM.from_pretrained(tmp_path / "saved")


def test_dtype_and_device(modular_path, tmp_path):
    model = ModularForCausalLM.from_modular(modular_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    ids = make_ids()
    again = ModularForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, device_map="cpu"
    )
    assert {parameter.dtype for parameter in whole.experts.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="device_map: expected one device"):
        ModularForCausalLM.from_pretrained(tmp_path / "saved", device_map={"a": 0, "b": 1})


def test_missing_and_damaged_files(modular_path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json; model.save_pretrained\(folder\)"):
        ModularForCausalLM.from_pretrained(tmp_path)
    ModularForCausalLM.from_modular(modular_path).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"0123456789")
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        ModularForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: missing"):
        ModularForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["share", "mlp", "transformer"])
def test_models_that_were_never_on_disk_are_bundled(tmp_path, name):
    """Llama, GPT-2 and Mistral, tied and untied, with every kind of gate."""
    model = make_model(make_experts(), name)
    with pytest.raises(ValueError, match=r"expert 'expert-0': .*bundle=True"):
        model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved", bundle=True)
    again = ModularForCausalLM.from_pretrained(tmp_path / "saved")
    ids = make_prompts(2, 12)
    assert torch.equal(again(ids).logits, model(ids).logits)
    parameters = zip(model.gate.state_dict().items(), again.gate.state_dict().items(), strict=True)
    assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in parameters)


def test_the_plain_way_of_transformers_keeps_tied_weights(tmp_path):
    """All parts in one file: heads that are tied, and those that are not, come back."""
    model = make_model(make_experts())
    assert model.all_tied_weights_keys == {
        "experts.0.lm_head.weight": "experts.0.model.embed_tokens.weight"
    }
    PreTrainedModel.save_pretrained(model, tmp_path)
    again = PreTrainedModel.from_pretrained.__func__(ModularForCausalLM, tmp_path)
    ids = make_prompts(2, 12)
    for one, other in zip(model.experts, again.experts, strict=True):
        assert torch.equal(one(ids).logits, other(ids).logits)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-6, rtol=0)


def test_auto_classes(modular_path, tmp_path):
    model = ModularForCausalLM.from_modular(modular_path)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).names == ("code", "prose")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, ModularForCausalLM)
    assert torch.equal(again(make_ids()).logits, model(make_ids()).logits)
    made = AutoModelForCausalLM.from_config(make_model(make_experts()).config)
    assert made(make_prompts(1, 4)).logits.shape == (1, 4, VOCAB)


def test_pipeline(modular_path, tmp_path):
    model = ModularForCausalLM.from_modular(modular_path)
    model.save_pretrained(tmp_path)
    tokenizer = ExpertSet.open([entry["path"] for entry in model.config.experts]).tokenizer
    ids = tokenizer("def return", return_tensors="pt").input_ids
    expected = model.generate(ids, do_sample=False, max_new_tokens=8)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    found = generator("def return", do_sample=False, max_new_tokens=8)[0]["generated_text"]
    assert found == tokenizer.decode(expected[0], skip_special_tokens=True)
    pair = generator(["def return", "the"], do_sample=False, max_new_tokens=8, batch_size=2)
    assert pair[0][0]["generated_text"] == found

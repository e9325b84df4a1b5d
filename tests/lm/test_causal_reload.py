"""What a saved modular model keeps, and what does not come back as something else."""

from __future__ import annotations

import json

import pytest
import torch
from causal_models import make_expert, make_experts, make_model, make_prompts
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from robustgate.lm import ExpertSet, LogProbStore, ModularForCausalLM
from robustgate.lm.causal import files
from robustgate.lm.gates.fit import fit


def make_two(spec="bayes"):
    return make_model([make_expert("llama", 0), make_expert("gpt2", 1)], spec, prior=[0.7, 0.3])


def weights_in(folder):
    return sorted(path.parent.name for path in folder.rglob("experts/*/*.safetensors"))


@pytest.mark.parametrize("bundle", [True, False])
def test_a_bundle_keeps_no_expert_that_the_model_does_not_have(
    modular_path, tmp_path, experts_path, bundle
):
    saved = tmp_path / "saved"
    ModularForCausalLM.from_modular(modular_path).save_pretrained(saved, bundle=True)
    (saved / "experts" / "mine").mkdir()  # no copy of a bundle: left alone
    assert weights_in(saved) == ["code", "prose"]
    one = ExpertSet.open(experts_path / "prose")
    store = LogProbStore.open(modular_path.parent / "store")
    fit(store, tmp_path / "one", experts=one, progress=False)
    model = ModularForCausalLM.from_modular(tmp_path / "one")
    model.save_pretrained(saved, bundle=bundle)
    assert weights_in(saved) == (["prose"] if bundle else [])
    assert (saved / "experts" / "mine").is_dir()
    assert ModularForCausalLM.from_pretrained(saved).config.names == ("prose",)
    assert weights_in(experts_path.parent)  # the experts themselves


def test_the_trainer_evaluates_and_takes_a_gate_up_again(tmp_path):
    model = make_two("linear")
    model.gate.requires_grad_(True)
    ids = make_prompts(4, 12)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    trainer = Trainer(model, arguments)
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, abs=1e-4)
    model.save_pretrained(tmp_path / "checkpoint", bundle=True)
    trained = model.gate.head.weight.clone()
    with torch.no_grad():
        model.gate.head.weight.zero_()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))
    assert torch.equal(model.gate.head.weight, trained)


def test_a_gate_file_without_a_prefix_is_read(tmp_path):
    """As it was written before: bare names, no hash."""
    from safetensors.torch import save_file

    model = make_two()
    model.save_pretrained(tmp_path, bundle=True)
    save_file(dict(model.gate.state_dict()), tmp_path / "model.safetensors")
    content = json.loads((tmp_path / "config.json").read_text())
    del content["gate_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    again = ModularForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.gate.log_prior, model.gate.log_prior)


def test_a_gate_and_a_configuration_of_two_saves_are_refused(tmp_path, monkeypatch):
    model = make_two()
    model.save_pretrained(tmp_path, bundle=True)
    model.gate.log_prior.copy_(model.gate.log_prior.flip(0))
    write = files.write_atomic

    def killed(path, content):
        if path.name == "config.json":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(files, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path, bundle=True)
    with pytest.raises(ValueError, match=r"not the gate that config.json was written with"):
        ModularForCausalLM.from_pretrained(tmp_path)


def test_any_token_that_ends_an_experts_document_ends_a_document(modular_path, monkeypatch):
    load = ExpertSet.load

    def with_stops(self, name, **given):
        expert = load(self, name, **given)
        own = expert.config.eos_token_id
        expert.generation_config.eos_token_id = {"code": [own, 5], "prose": 7}[name]
        return expert

    monkeypatch.setattr(ExpertSet, "load", with_stops)
    model = ModularForCausalLM.from_modular(modular_path)
    own = model.experts[0].config.eos_token_id
    assert model.generation_config.eos_token_id == [own, 5, 7]


@torch.no_grad()
@pytest.mark.parametrize("spec", ["bayes", "mlp"])
def test_the_dtype_in_memory_comes_back(tmp_path, spec):
    """GPT-2 has no table that a cast rounds besides the weights."""
    model = make_model([make_expert("gpt2", 0), make_expert("gpt2", 1)], spec, prior=[0.7, 0.3])
    ids = make_prompts(2, 9)
    model.save_pretrained(tmp_path / "whole", bundle=True)
    model = ModularForCausalLM.from_pretrained(tmp_path / "whole").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    again = ModularForCausalLM.from_pretrained(tmp_path / "saved")
    assert {part.dtype for part in again.experts.parameters()} == {torch.bfloat16}
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(again(ids).gate_log_weights, model(ids).gate_log_weights)


def test_an_expert_that_was_replaced_is_not_saved_as_its_checkpoint(modular_path, tmp_path):
    model = ModularForCausalLM.from_modular(modular_path)
    model.experts[0] = model.experts[1]
    with pytest.raises(ValueError, match="expert 'code': replaced since the model was made"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()


def test_arguments_of_from_pretrained_count_or_are_refused(tmp_path):
    make_model(make_experts()).save_pretrained(tmp_path / "saved", bundle=True)
    for kind in (ModularForCausalLM, AutoModelForCausalLM):
        model = kind.from_pretrained(
            tmp_path / "saved", top_k_experts=1, attn_implementation="eager", local_files_only=True
        )
        assert model.config.top_k_experts == 1
        assert {expert.config._attn_implementation for expert in model.experts} == {"eager"}
        model = kind.from_pretrained(tmp_path, subfolder="saved", dtype="bfloat16")
        assert model.dtype == torch.bfloat16
        for name in ("load_in_4bit", "output_loading_info"):
            with pytest.raises(ValueError, match=f"{name}: not supported"):
                kind.from_pretrained(tmp_path / "saved", **{name: True})
    with pytest.raises(ValueError, match="dtype: expected one of torch's"):
        ModularForCausalLM.from_pretrained(tmp_path / "saved", dtype="bfloa")
    with pytest.raises(ValueError, match=r"expected a folder and keywords, got \(1,\)"):
        ModularForCausalLM.from_pretrained(tmp_path / "saved", 1)
    with pytest.raises(ValueError, match=r"push_to_hub: .*bundle=True"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)

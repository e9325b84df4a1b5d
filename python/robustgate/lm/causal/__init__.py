"""The modular model as one causal language model of transformers.

Importing this package registers the model with ``AutoConfig`` and ``AutoModelForCausalLM``.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from robustgate.lm.causal.config import MODEL_TYPE, ModularConfig, ModularOutput
from robustgate.lm.causal.model import ModularForCausalLM

AutoConfig.register(MODEL_TYPE, ModularConfig, exist_ok=True)
AutoModelForCausalLM.register(ModularConfig, ModularForCausalLM, exist_ok=True)

__all__ = ["ModularConfig", "ModularForCausalLM", "ModularOutput"]

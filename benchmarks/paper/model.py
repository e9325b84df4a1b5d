"""The study's language models: one causal transformer layer over 100 tokens."""

import torch
from tasks import LENGTH, VOCABULARY
from torch import Tensor, nn

from robustgate.game.transformer import Block


class TinyLM(nn.Module):
    """A causal transformer of one layer and two heads; token -1 opens a document."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY + 1, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.block = Block(width, heads=2, hidden=32)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:  # int [n, t] -> [n, t + 1, V], t < T
        """Logits of tokens 0 to t, each from those before it."""
        known = nn.functional.pad(ids, (1, 0), value=VOCABULARY)
        t = known.shape[1]
        x = self.tokens(known) + self.positions.weight[:t]
        allowed = self.causal[:t, :t].expand(len(ids), 1, t, t)
        return self.head(self.norm(self.block(x, allowed)))

    def token_log_probs(self, ids: Tensor) -> Tensor:  # int [n, T] -> [n, T]
        log_probs = torch.log_softmax(self(ids[:, :-1]), dim=-1)
        return log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def train(
    probs: Tensor,  # [200], of the documents to learn
    ids: Tensor,  # int [200, T]
    width: int,
    steps: int,
    seed: int,
) -> TinyLM:
    """A model trained on documents drawn with these probabilities."""
    torch.manual_seed(seed)
    model = TinyLM(width).to(ids.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    for _ in range(steps):
        rows = torch.multinomial(probs, 64, replacement=True).to(ids.device)
        loss = -model.token_log_probs(ids[rows]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def generate(model: TinyLM, count: int, generator: torch.Generator) -> Tensor:  # int [n, T]
    """Documents drawn from the model."""
    device = model.head.weight.device
    ids = torch.empty(count, 0, dtype=torch.long, device=device)
    for _ in range(LENGTH):
        probs = torch.softmax(model(ids)[:, -1], dim=-1)
        ids = torch.cat([ids, torch.multinomial(probs.cpu(), 1, generator=generator).to(device)], 1)
    return ids

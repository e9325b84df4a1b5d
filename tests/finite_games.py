"""Finite games with closed-form values, and their documents for stochastic training."""

import math

import torch

from robustgate.game import Documents, SequenceGate

# name: domains [D, X], experts [K, X], value, mixture or None, multiplier or None
GAMES = {
    "clipped at one domain": (
        [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]],
        [[0.9, 0.1, 0, 0], [0, 0, 0.5, 0.5]],
        math.log((1 + math.sqrt(0.1)) / (1.8 * math.sqrt(0.1))),
        [1 - math.sqrt(0.1), math.sqrt(0.1)],
        0.7312376,
    ),
    "misfit that costs nothing": (
        [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]],
        [[0.7, 0.3, 0, 0], [0, 0, 0.4, 0.6]],
        math.log(2),
        [0.5, 0.5],
        1.0,
    ),
    "one domain": ([[0.3, 0.3, 0.4]], [[0.6, 0.1, 0.3], [0.5, 0.4, 0.1]], 0.0822829, [1.0], 1.4),
    "no binding normaliser": (
        [[1.0, 0, 0]],
        [[0.5, 0.3, 0.2], [0.4, 0.2, 0.4]],
        math.log(2),
        [1.0],
        0.0,
    ),
    "more domains than experts": (
        [[0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.1, 0.7]],
        [[0.7, 0.2, 0.1], [0.1, 0.7, 0.2]],
        0.5826853,
        [0.0, 0.0, 1.0],
        0.375,
    ),
}


def enumerated(domains, experts):
    """Exact documents of every domain, exact samples of every expert, entropies as baselines."""
    domains = torch.tensor(domains, dtype=torch.float64)
    experts = torch.tensor(experts, dtype=torch.float64)
    inputs = torch.eye(domains.shape[1], dtype=torch.float64)  # [X, X], one feature for each x
    log_probs = experts.log().T  # [X, K]
    batch = {f"d{d}": Documents(inputs, log_probs, p) for d, p in enumerate(domains)}
    samples = [Documents(inputs, log_probs, pi) for pi in experts]
    entropy = -torch.xlogy(domains, domains).sum(dim=1)
    return batch, samples, dict(zip(batch, entropy.tolist(), strict=True))


def drawn(probs, log_probs, count, generator):
    """A sample of ``count`` documents from probabilities over an enumerated space."""
    rows = torch.multinomial(torch.as_tensor(probs), count, replacement=True, generator=generator)
    return Documents(torch.eye(len(log_probs), dtype=torch.float64)[rows], log_probs[rows])


def markov_space(starts, stays, length):
    """All binary sequences of ``length`` with the token log-probs of Markov experts, [X, T, K].

    Expert k starts with 1 with probability ``starts[k]`` and repeats the last token with
    probability ``stays[k]``.
    """
    start, stay = (torch.tensor(v, dtype=torch.float64) for v in (starts, stays))
    ids = torch.cartesian_prod(*[torch.arange(2)] * length)  # [X, T]
    first = torch.where(ids[:, :1] == 1, start, 1 - start).unsqueeze(1)  # [X, 1, K]
    same = (ids[:, 1:] == ids[:, :-1]).unsqueeze(-1)
    tokens = torch.cat([first, torch.where(same, stay, 1 - stay)], dim=1).log()
    return ids, tokens


def tabular(game):
    """A gate with weights of its own for each of the X points."""
    return SequenceGate.linear(len(game[0][0]), len(game[1])).double()

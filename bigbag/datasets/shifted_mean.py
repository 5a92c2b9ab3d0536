"""Bags whose positive instances stand side by side."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Normal

from bigbag.datasets.base import InMemoryDataset


class ShiftedMeanMILDataset(InMemoryDataset):
    r"""Gaussian bags; in a positive one, ``R`` neighbouring instances have their first ``K`` features shifted.

        S_i ~ U{S_low, ..., S_high},   Y_i ~ Bernoulli(p_y1),   u_i ~ U{0, ..., S_i - R}
        h_ij ~ N(mu, sigma^2),   h_ijk += Delta  if Y_i = 1, u_i <= j < u_i + R, k < K

    A bag also holds ``bag_size``. The same seed gives torchmil's bags.

    "Synthetic Data Reveals Generalization Gaps in Correlated Multiple Instance Learning", arXiv:2510.25759.

    Args:
        N: number of bags.
        R: number of shifted instances in a positive bag.
        S_low: smallest bag.
        S_high: largest bag.
        K: number of shifted features.
        M: number of features.
        p_y1: probability of a positive bag.
        Delta: the shift.
        mu: mean of the features.
        sigma: standard deviation of the features.
        seed: seed of everything random.

    Raises:
        ValueError: the smallest bag has no room for ``R`` instances.
    """

    def __init__(
        self,
        N: int = 100,
        R: int = 3,
        S_low: int = 15,
        S_high: int = 45,
        K: int = 1,
        M: int = 768,
        p_y1: float = 0.5,
        Delta: float = 1.0,
        mu: float = 0.0,
        sigma: float = 1.0,
        seed: int = 42,
    ) -> None:
        if not 1 <= R <= S_low <= S_high:
            raise ValueError(f"R is {R}, S_low {S_low}, S_high {S_high}, expected 1 <= R <= S_low <= S_high")
        self.N, self.R, self.S_low, self.S_high = N, R, S_low, S_high
        self.K, self.M, self.p_y1, self.Delta = K, M, p_y1, Delta
        self.mu, self.sigma, self.seed = mu, sigma, seed
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(S_low, S_high + 1, (N,), generator=generator)
        self.lengths = tuple(sizes.tolist())
        self.H = mu + sigma * torch.randn(sum(self.lengths), M, generator=generator)
        self.H_split = self.H.split(self.lengths)
        starts = [int(torch.randint(0, size - R + 1, (1,), generator=generator)) for size in self.lengths]
        self.u = torch.tensor(starts)
        self.y = torch.bernoulli(torch.full((N,), p_y1), generator=generator).long()
        self.y_inst_list = [torch.zeros(size, dtype=torch.long) for size in self.lengths]
        self.bags_list = []
        for X, label, y_inst, start in zip(self.H_split, self.y, self.y_inst_list, starts):
            if label == 1:
                X[start : start + R, :K] += Delta
                y_inst[start : start + R] = 1
            self.bags_list.append({"X": X, "Y": label, "y_inst": y_inst, "bag_size": torch.tensor(len(X))})

    def p_y1_given_h(self, index: int) -> Tensor:
        r"""The probability that a bag is positive, by Bayes' rule: what no model can beat.

            P(Y = 1 | h) = p q / (p q + 1 - p)
            q = mean_u prod_{u <= j < u + R, k < K} N(h_jk; mu + Delta, sigma^2) / N(h_jk; mu, sigma^2)

        In logarithms, in O(S K); torchmil multiplies S K densities, which underflows, and takes ``mu`` = 0 and
        ``sigma`` = 1 for the features that are not shifted.

        Args:
            index: the bag.

        Returns:
            ``()``.
        """
        h = self.bags_list[index]["X"][:, : self.K].double()
        shifted, plain = Normal(self.mu + self.Delta, self.sigma), Normal(self.mu, self.sigma)
        ratio = (shifted.log_prob(h) - plain.log_prob(h)).sum(1)
        at_start = ratio.unfold(0, self.R, 1).sum(1)
        log_q = at_start.logsumexp(0) - torch.tensor(float(len(at_start))).log()
        prior = torch.logit(torch.tensor(self.p_y1, dtype=torch.float64))
        return torch.sigmoid(prior + log_q).float()

"""Memory of a step on a bag that 1, 2 and 4 ranks share: the table of README, ``python -m`` this module."""

from bigbag.testing import run_ranks
from tests.models.test_in_parts import peak_of_step

WIDTH, RANKS = 256, (1, 2, 4)
MODELS = {
    "ABMIL": ({"att_dim": 128}, 400),
    "SmABMIL": ({"att_dim": 128}, 400),
    "PatchGCN": ({"n_gcn_layers": 3, "hidden_dim": 128}, 400),
    "TransMIL": ({"att_dim": 128, "n_landmarks": 64}, 400),
    "TransformerABMIL": ({"transf_att_dim": 128}, 110),
}


def main() -> None:
    print(f"| model | instances | {' | '.join(f'{r} rank' + 's' * (r > 1) for r in RANKS)} |")
    for name, (arguments, side) in MODELS.items():
        peaks = [max(run_ranks(peak_of_step, r, name, arguments, side, WIDTH, timeout_s=600)) for r in RANKS]
        cells = [f"{peak / 2**20:.0f} MiB ({peak / peaks[0]:.2f})" for peak in peaks]
        print(f"| {name} | {side**2:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

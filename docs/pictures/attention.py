"""Draws attention.png, the picture of README: two patterns, and what a trained graph attention network attends to.

python docs/pictures/attention.py    needs the extra viz
"""

from pathlib import Path

import matplotlib as mpl
import networkx
import torch
import torch.nn.functional as F

import anyattention as aa

mpl.use("Agg")
from matplotlib import pyplot as plt  # the backend is chosen first

LENGTH = 64
PATTERNS = {
    "Window(5, 5) | Global(3)": aa.Window(5, 5) | aa.Global(3),
    "Strided(8, 4) & Causal()": aa.Strided(8, 4) & aa.Causal(),
}
# The karate club split in two: the instructor's side and the president's.
INSTRUCTOR, PRESIDENT = 0, 33


def attention_weights(graph: aa.Graph) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of one layer's edges, and the side that two layers tell, after training on the two leaders alone."""
    torch.manual_seed(0)
    first = aa.nn.GraphAttention(16, 4, in_features=graph.num_queries, dropout=0.0)
    second = aa.nn.GraphAttention(2, 1, in_features=16, dropout=0.0)
    parameters = [*first.parameters(), *second.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01, weight_decay=5e-4)
    leaders, sides = torch.tensor([INSTRUCTOR, PRESIDENT]), torch.tensor([0, 1])
    x = torch.eye(graph.num_queries)
    for _ in range(200):
        logits, weights = second(F.elu(first(x, graph).output), graph, return_weights=True)
        optimizer.zero_grad()
        F.cross_entropy(logits[leaders], sides).backward()
        optimizer.step()
    return weights.detach(), logits.argmax(1)


def draw_club(axes: plt.Axes) -> None:
    """The members, their friendships as wide as the attention paid along them, and the side that the network tells."""
    club = networkx.karate_club_graph()
    graph = aa.Graph.from_networkx(club).with_self_loops()
    weights, sides = attention_weights(graph)
    places = networkx.spring_layout(club, seed=4)
    ends = list(zip(graph.key_index.tolist(), graph.query_index.tolist(), strict=True))
    arrows = [(edge, weight) for edge, weight in zip(ends, weights.tolist(), strict=True) if edge[0] != edge[1]]
    networkx.draw_networkx_edges(
        networkx.DiGraph(edge for edge, _ in arrows),
        places,
        ax=axes,
        edgelist=[edge for edge, _ in arrows],
        width=[0.2 + 3.5 * weight for _, weight in arrows],
        alpha=0.6,
        edge_color="#444444",
        arrowsize=5,
        node_size=90,
        connectionstyle="arc3,rad=0.1",
    )
    colours = ["#e08a1e" if side == 0 else "#1f5fbf" for side in sides.tolist()]
    rings = ["black" if node in (INSTRUCTOR, PRESIDENT) else "white" for node in club]
    networkx.draw_networkx_nodes(club, places, ax=axes, node_size=90, node_color=colours, edgecolors=rings)
    axes.set_title(
        "Graph attention on Zachary's karate club: wider lines get more attention.\nThe network was told the sides of "
        "the two ringed members, and colours the others.",
        fontsize=9,
    )
    axes.axis("off")


def main(path: Path) -> None:
    """Draw and write."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), width_ratios=(1, 1, 1.5), layout="constrained")
    for place, (title, pattern) in zip(axes, PATTERNS.items(), strict=False):
        pattern.draw(LENGTH, axes=place)
        place.set_title(title, fontsize=9)
    draw_club(axes[2])
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(__file__).with_name("attention.png"))

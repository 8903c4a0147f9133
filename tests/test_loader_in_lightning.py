"""NeighborLoader under Lightning's Trainer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyattention import Graph, NeighborLoader, SampledGraph
from anyattention.nn import GraphAttention

lightning = pytest.importorskip("pytorch_lightning")

NODES = 300


class Classifier(lightning.LightningModule):
    """Two layers that tell the sign of a feature; it keeps the seeds of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [GraphAttention(8, 2, in_features=4, residual=True), GraphAttention(2, 1, in_features=8, residual=True)]
        )
        self.features = torch.randn(NODES, 4, generator=torch.Generator().manual_seed(0))
        self.labels = (self.features[:, 0] > 0).long()
        self.seeds: list[list[int]] = []
        self.right = 0

    def forward(self, sampled: SampledGraph) -> Tensor:
        x = self.features[sampled.nodes]
        for layer, block in zip(self.layers, sampled.blocks, strict=True):
            x = layer((x, x[: block.num_queries]), block).output
        return x

    def on_train_epoch_start(self) -> None:
        self.seeds.append([])

    def training_step(self, sampled: SampledGraph, _: int) -> Tensor:
        seeds = sampled.nodes[: sampled.num_seeds]
        self.seeds[-1] += seeds.tolist()
        return F.cross_entropy(self(sampled), self.labels[seeds])

    def validation_step(self, sampled: SampledGraph, _: int) -> None:
        self.right += int((self(sampled).argmax(1) == self.labels[sampled.nodes[: sampled.num_seeds]]).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*You defined a `validation_step`")
def test_a_trainer_takes_the_loader(workers: int, tmp_path: Any) -> None:
    torch.manual_seed(0)
    graph = Graph.from_edge_index(torch.randint(NODES, (2, 2_000)), NODES)
    train, validation = torch.arange(200), torch.arange(200, NODES)
    quiet: dict[str, Any] = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    trainer = lightning.Trainer(
        max_epochs=12, accelerator="cpu", devices=1, default_root_dir=tmp_path, use_distributed_sampler=False,
        num_sanity_val_steps=0, check_val_every_n_epoch=12, log_every_n_steps=1, **quiet,
    )  # fmt: skip
    given: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = NeighborLoader(graph, train, [4, 3], batch_size=32, shuffle=True, **given)
    model = Classifier()
    trainer.fit(model, loader, NeighborLoader(graph, validation, [-1, -1], batch_size=50))
    assert [sorted(seeds) for seeds in model.seeds] == [train.tolist()] * 12
    assert len({tuple(seeds) for seeds in model.seeds}) == 12
    assert model.right > 85

"""A search makes a few candidates and images for each point and pair returned, whatever shape the points fill."""

import itertools

import pytest
import torch

from anyattention import Graph
from anyattention.geometry import cell_list, nearest, neighbours
from anyattention.geometry.clouds import read_clouds
from anyattention.geometry.lattice import Lattice, wrapped
from benchmarks.shapes import RADIUS, shapes

NAMES = list(shapes(20))
# Candidates and images for each point and pair.
MOST = 80


class _Counted:
    """A tree that counts the keys that it is asked for."""

    def __init__(self, tree, counts):
        self.tree, self.counts = tree, counts

    def query(self, points, k, **settings):
        self.counts["asked"] += len(points) * len(k)
        return self.tree.query(points, k=k, **settings)

    def query_pairs(self, r, output_type):
        found = self.tree.query_pairs(r, output_type=output_type)
        self.counts["pairs"] += len(found)
        return found

    def sparse_distance_matrix(self, other, r, output_type):
        found = self.tree.sparse_distance_matrix(other.tree, r, output_type=output_type)
        self.counts["pairs"] += len(found)
        return found


@pytest.fixture
def counts(monkeypatch):
    """What a search makes: keys asked for, pairs, copies of points, and what vesin goes through."""
    counts = dict.fromkeys(("asked", "pairs", "copies", "cells"), 0)
    for module in (nearest, neighbours):
        plain = module.tree_of
        monkeypatch.setattr(module, "tree_of", lambda points, plain=plain: _Counted(plain(points), counts))
    plain_copies, plain_box = Lattice.copies, cell_list.numbered_box

    def copies(self, *arguments):
        found = plain_copies(self, *arguments)
        counts["copies"] += len(found.row)
        return found

    def numbered_box(*arguments):
        box = plain_box(*arguments)
        counts["cells"] += 0 if box is None else _gone_through(box)
        return box

    monkeypatch.setattr(Lattice, "copies", copies)
    monkeypatch.setattr(neighbours, "numbered_box", numbered_box)
    return counts


def _gone_through(box):
    """Cells, and pairs of points in one cell, in a box whose cells are as wide as the cutoff."""
    cells = (box.points / box.cutoff).floor()
    held = torch.unique(cells, dim=0, return_counts=True)[1]
    return float((box.vectors.norm(dim=1) / box.cutoff).clamp_min(1).prod()) + int(held.square().sum())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [2000, 8000])
def test_work_is_linear_in_points_and_pairs(counts, name, count):
    points, cell, periodic = shapes(count)[name]
    given = {} if cell is None else {"cell": cell, "periodic": periodic}
    for search, reach in ((Graph.radius, RADIUS), (Graph.nearest, 20)):
        counts.update(dict.fromkeys(counts, 0))
        edges = search(points, reach, **given).num_edges
        assert sum(counts.values()) <= MOST * (count + edges), (search.__name__, counts, edges)


@pytest.mark.parametrize("name", NAMES)
def test_work_for_other_queries_is_linear_too(counts, name):
    points, cell, periodic = shapes(4000)[name]
    given = {} if cell is None else {"cell": cell, "periodic": periodic}
    for search, reach in ((Graph.radius, RADIUS), (Graph.nearest, 5)):
        counts.update(dict.fromkeys(counts, 0))
        edges = search(points[::2], reach, queries=points[1::2], **given).num_edges
        assert sum(counts.values()) <= MOST * (4000 + edges), (search.__name__, counts, edges)


@pytest.mark.parametrize("is_one_set", [True, False])
def test_points_that_coincide_look_for_neighbours_once(counts, is_one_set):
    places = torch.rand(100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = places.repeat(20, 1)
    graph = Graph.nearest(points, 20) if is_one_set else Graph.nearest(places, 20, queries=points)
    assert graph.num_edges == 20 * len(points)
    # Of each place a few candidates more than the 20, twice as many where they are ties.
    assert counts["asked"] <= 100 * 3 * 22


def test_vesin_is_handed_no_box_that_it_cannot_number(monkeypatch):
    """With its own formula for how many cells there are along each axis, which gives some boxes none."""
    generator = torch.Generator().manual_seed(0)
    handed = 0
    for number, periodic in zip(range(400), itertools.cycle(itertools.product((False, True), repeat=3)), strict=False):
        sides = 10.0 ** (5 * torch.rand(3, generator=generator, dtype=torch.float64) - 2)
        points = sides * torch.rand(20_000, 3, generator=generator, dtype=torch.float64)
        cell = torch.diag(sides) if number % 2 else torch.tril(torch.ones(3, 3)).double() * sides
        clouds = read_clouds(points, None, cell, periodic, None, None)
        box = cell_list.numbered_box(clouds, 0.5, wrapped(clouds) if any(periodic) else None)
        if box is None:
            continue
        handed += 1
        extents = box.points.amax(0) - box.points.amin(0)
        widths = torch.where(
            torch.tensor(box.repeats),
            1 / torch.linalg.inv(box.vectors).norm(dim=0),
            (1.01 * torch.where(extents < 1e-6, 1.0, extents)).clamp_min(1),
        )
        cells = (widths / box.cutoff).trunc().clamp_min(1).tolist()
        if cells[0] * cells[1] * cells[2] > 1e5:
            first, second = cells[0] / cells[1], cells[1] / cells[2]
            cells[2] = int((1e5 / (first * second * second)) ** (1 / 3))
            cells[1] = int(second * cells[2])
            cells[0] = int(first * cells[1])
        assert min(cells) >= 1, (sides, periodic)
        assert max(cells) < 2**20
    assert handed > 40


def test_a_copy_is_made_of_a_few_queries_only():
    """Of points in a cube 20 wide those copies of queries that reach across a boundary, not of all."""
    points = 20 * torch.rand(8000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = []
    plain = nearest._from_copies

    def counted(clouds, k, moved, keys, copies, bound, found):
        made.append(len(copies.row))
        return plain(clouds, k, moved, keys, copies, bound, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "_from_copies", counted)
        Graph.nearest(points, 3, cell=20 * torch.eye(3, dtype=torch.float64))
    assert 0 < made[0] < 8000

"""Random orthogonal matrices are orthogonal, and as likely one way as any other."""

import torch

from anyattention.geometry.orthogonal import random_orthogonal


def test_matrices_are_orthogonal_and_uniform():
    generator = torch.Generator().manual_seed(0)
    matrices = random_orthogonal(20_000, 3, generator=generator)
    assert matrices.dtype == torch.float64
    identity = torch.eye(3, dtype=torch.float64).expand_as(matrices)
    torch.testing.assert_close(matrices @ matrices.mT, identity, rtol=0, atol=1e-12)
    # By Haar's measure an element has mean 0 and mean square 1/3, the trace mean square 1, and half of them reflect.
    assert matrices.mean(0).abs().max() < 0.02
    assert (matrices.square().mean(0) - 1 / 3).abs().max() < 0.02
    trace = matrices.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(trace.square().mean() - 1) < 0.05
    assert abs((torch.linalg.det(matrices) > 0).double().mean() - 0.5) < 0.02


def test_the_same_seed_gives_the_same_matrices():
    first, second = (random_orthogonal(2, 4, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)

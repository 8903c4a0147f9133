"""What memories say of images, against brute force."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize, one_hot

from examples.memory.images import CLASSES, Data, Images, load_data
from examples.memory.model import Encoder, Settings, empty_memory, label_values
from examples.memory.recall import (
    NEIGHBOURS,
    accuracy,
    answer,
    ask_pixels,
    encode,
    number_of_parts,
    number_of_pixel_parts,
    recall,
)
from examples.memory.train import Fit, Trained

SMALL = Settings(k=5, key_dim=7, channels=2, batch=11, held_out=3)


@pytest.fixture(scope="module")
def data(data_folder: Path) -> Data:
    train, test = load_data(data_folder / "fashion_small.npz")
    return Data(train.chosen(torch.arange(1100)), test.chosen(torch.arange(130)))


def untrained() -> Fit:
    torch.manual_seed(0)
    return Fit(*[Trained(Encoder(SMALL).eval(), [1.0], 1.0) for _ in range(2)], interrupted=False)


def probabilities_of(encoder: Encoder, memories: Images, asked: Images) -> torch.Tensor:
    """The answers, in float64: all cosines, and the softmax of the k largest."""
    with torch.no_grad():
        keys, queries = (normalize(encoder(images.pixels).double(), dim=1) for images in (memories, asked))
    best = (queries @ keys.T).topk(SMALL.k)
    values = one_hot(memories.labels[best.indices], len(CLASSES)).double()
    return ((SMALL.scale * best.values).softmax(1).unsqueeze(2) * values).sum(1)


def test_the_answers_are_those_of_brute_force(data: Data) -> None:
    done, parts = untrained(), []
    told = recall(done, data, SMALL, lambda: parts.append(1))
    known = data.train.chosen(data.train.labels != SMALL.held_out)
    for answers, trained, memories in (
        (told.answers, done.whole, data.train),
        (told.before, done.without, known),
        (told.after, done.without, data.train),
    ):
        expected = probabilities_of(trained.encoder, memories, data.test)
        torch.testing.assert_close(answers.probabilities.double(), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(answers.labels, answers.probabilities.argmax(1))
        # The memories are told by the places of their images: their labels, by weight, are the answer.
        values = one_hot(data.train.labels[answers.memories], len(CLASSES)).float()
        torch.testing.assert_close((answers.weights.unsqueeze(2) * values).sum(1), answers.probabilities)
    assert not (told.before.labels == SMALL.held_out).any()
    assert (told.after.labels == SMALL.held_out).any()
    assert told.memory.num_memories == 1100
    assert len(parts) == number_of_parts(data) == 6
    torch.testing.assert_close(told.keys, encode(done.whole.encoder, data.test.pixels))


def test_an_image_in_the_memory_finds_itself(data: Data) -> None:
    encoder = untrained().whole.encoder
    keys = encode(encoder, data.train.pixels[:50])
    memory = empty_memory(SMALL)
    memory.append(keys, label_values(data.train.labels[:50]))
    found = answer(memory, keys, 100 + torch.arange(50))
    assert torch.equal(found.memories[:, 0], 100 + torch.arange(50))
    torch.testing.assert_close(found.weights.sum(1), torch.ones(50))


def test_neighbours_in_pixels_are_those_of_brute_force(data: Data) -> None:
    parts = []
    found = ask_pixels(data, 1, lambda: parts.append(1))
    train, test = (images.pixels.flatten(1).double() for images in data)
    votes = data.train.labels[torch.cdist(test, train).topk(NEIGHBOURS, largest=False).indices]
    # Of classes with as many votes scikit-learn takes the first, as argmax does.
    expected = one_hot(votes, len(CLASSES)).sum(1).argmax(1)
    assert torch.equal(found.neighbours, expected)
    assert accuracy(found.logistic, data.test.labels) > 0.7
    assert len(parts) == number_of_pixel_parts(data) == 2


def test_the_share_of_right_answers() -> None:
    assert accuracy(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])) == pytest.approx(2 / 3)

"""Losses as PyTorch defines them, metrics as exact sums, and words for the place that is wrong."""

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from toolkit.errors import JobError
from toolkit.tasks import Classification, LanguageModeling, Regression

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 3, 0, 1])
TOKEN_LOGITS = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[0, 4, 2], [2, 1, 2]])
VALUES = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
TARGETS = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))


def values(metrics: Any) -> dict[str, tuple[float, float]]:
    return {name: (float(numerator), float(denominator)) for name, (numerator, denominator) in metrics.items()}


def test_classification_loss_is_cross_entropy_of_each_sample() -> None:
    losses = Classification().loss(LOGITS, CLASSES)
    assert losses.shape == (6,)
    torch.testing.assert_close(losses.mean(), F.cross_entropy(LOGITS, CLASSES))


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_smoothed_labels_have_a_share_of_every_class_and_metrics_do_not_know(smoothing: float) -> None:
    task = Classification(smoothing)
    soft = (1 - smoothing) * F.one_hot(CLASSES, 4) + smoothing / 4
    torch.testing.assert_close(task.loss(LOGITS, CLASSES), -(soft * LOGITS.log_softmax(1)).sum(1))
    assert values(task.metrics(LOGITS, CLASSES)) == values(Classification().metrics(LOGITS, CLASSES))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_loss_of_a_mixed_target_is_that_of_its_soft_label(smoothing: float, dtype: torch.dtype) -> None:
    others, shares = CLASSES.flip(0), torch.linspace(0, 1, 6)
    soft = shares[:, None] * F.one_hot(CLASSES, 4) + (1 - shares[:, None]) * F.one_hot(others, 4)
    expected = F.cross_entropy(LOGITS.to(dtype).float(), soft, reduction="none", label_smoothing=smoothing)
    losses = Classification(smoothing).loss(LOGITS.to(dtype), (CLASSES, others, shares))
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(losses.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2.0])
def test_a_smoothing_that_leaves_nothing_of_the_label_is_refused(smoothing: float) -> None:
    with pytest.raises(JobError, match=r"label_smoothing is .*; it must be at least 0 and below 1"):
        Classification(smoothing)


def test_classification_metrics_are_sums_over_samples() -> None:
    metrics = values(Classification().metrics(LOGITS, CLASSES))
    hits = sum(int(row.argmax()) == int(target) for row, target in zip(LOGITS, CLASSES, strict=True))
    assert metrics["accuracy"] == (hits, 6)
    assert metrics["loss"] == (pytest.approx(F.cross_entropy(LOGITS, CLASSES, reduction="sum").item()), 6)


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 2)])
def test_regression_loss_is_the_mean_squared_error_of_each_sample(shape: tuple[int, ...]) -> None:
    output, target = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    losses = Regression().loss(output, target)
    assert losses.shape == (6,)
    torch.testing.assert_close(losses.mean(), F.mse_loss(output, target))


def test_regression_metrics_are_sums_over_values() -> None:
    metrics = values(Regression().metrics(VALUES, TARGETS))
    assert metrics["loss"] == (pytest.approx(F.mse_loss(VALUES, TARGETS, reduction="sum").item()), 18)
    assert metrics["mean_absolute_error"] == (pytest.approx(F.l1_loss(VALUES, TARGETS, reduction="sum").item()), 18)


def test_one_output_a_sample_may_have_a_dimension_of_its_own() -> None:
    output, target = VALUES[:, :1], TARGETS[:, 0]
    torch.testing.assert_close(Regression().loss(output, target), (VALUES[:, 0] - target).square())
    assert values(Regression().metrics(output, target)) == values(Regression().metrics(output[:, 0], target))


@pytest.mark.parametrize("method", ["loss", "metrics"])
@pytest.mark.parametrize(("output", "target"), [((6,), (6, 1)), ((6, 3), (6,)), ((1,), (6,)), ((6, 1), (6, 3))])
def test_shapes_that_would_be_broadcast_are_refused(
    output: tuple[int, ...], target: tuple[int, ...], method: str
) -> None:
    with pytest.raises(ValueError, match=r"output has shape .* the target .* must be the same"):
        getattr(Regression(), method)(torch.zeros(output), torch.zeros(target))


def test_language_modeling_loss_is_the_mean_over_the_tokens_of_each_sample() -> None:
    losses = LanguageModeling().loss(TOKEN_LOGITS, TOKENS)
    expected = [F.cross_entropy(logits, tokens) for logits, tokens in zip(TOKEN_LOGITS, TOKENS, strict=True)]
    torch.testing.assert_close(losses, torch.stack(expected))


@pytest.mark.parametrize("ignored", [2, -100])
def test_ignored_tokens_have_no_weight_and_no_loss(ignored: int) -> None:
    target = torch.where(TOKENS == 2, ignored, TOKENS)
    losses, weights = LanguageModeling(ignored).loss(TOKEN_LOGITS, target)
    assert weights.tolist() == [[1, 1, 0], [0, 1, 0]]
    mean = (losses * weights).sum() / weights.sum()
    torch.testing.assert_close(
        mean, F.cross_entropy(TOKEN_LOGITS.flatten(0, 1), target.flatten(), ignore_index=ignored)
    )


@pytest.mark.parametrize(("ignored", "counted"), [(None, 6), (2, 3)])
def test_language_modeling_metrics_are_sums_over_the_tokens_that_count(ignored: int | None, counted: int) -> None:
    metrics = values(LanguageModeling(ignored).metrics(TOKEN_LOGITS, TOKENS))
    of_tokens = F.cross_entropy(TOKEN_LOGITS.flatten(0, 1), TOKENS.flatten(), reduction="none").view_as(TOKENS)
    counts = torch.ones_like(TOKENS) if ignored is None else TOKENS.ne(ignored)
    total = (of_tokens * counts).sum().item()
    hits = ((TOKEN_LOGITS.argmax(-1) == TOKENS) * counts).sum().item()
    assert metrics["loss"] == (pytest.approx(total), counted)
    assert metrics["bits_per_token"] == (pytest.approx(total / log(2)), counted)
    assert metrics["accuracy"] == (hits, counted)


def test_a_prediction_of_the_ignored_token_is_no_hit() -> None:
    logits = F.one_hot(TOKENS, 5).float()
    assert values(LanguageModeling(2).metrics(logits, TOKENS))["accuracy"] == (3, 3)


@pytest.mark.parametrize(
    ("task", "output", "target"),
    [
        (Classification(), LOGITS, torch.tensor([0, 1, -100, 3, 0, 1])),
        (LanguageModeling(), TOKEN_LOGITS, torch.tensor([[0, 4, -100], [2, 1, 2]])),
        (LanguageModeling(2), TOKEN_LOGITS, torch.tensor([[0, 4, -100], [2, 1, 2]])),
    ],
)
@pytest.mark.parametrize("method", ["loss", "metrics"])
def test_a_label_that_nobody_asked_to_ignore_is_not_ignored(
    task: Any, output: Tensor, target: Tensor, method: str
) -> None:
    with pytest.raises(IndexError, match="-100"):
        getattr(task, method)(output, target)


def test_check_of_classification_names_each_wrong_class_and_its_place() -> None:
    wrong = Classification().check(LOGITS.shape, torch.tensor([0, 4, 2, -1, 3, 0]))
    assert wrong.keys() == {1, 3}
    assert "class index 4 is outside 0..3" in wrong[1]
    assert "class index -1 is outside 0..3" in wrong[3]


@pytest.mark.parametrize(("ignored", "places"), [(None, {0, 1}), (-1, {1})])
def test_check_of_language_modeling_names_each_row_with_a_wrong_token(ignored: int | None, places: set[int]) -> None:
    wrong = LanguageModeling(ignored).check(TOKEN_LOGITS.shape, torch.tensor([[0, -1, 4], [1, 7, 2], [0, 0, 0]]))
    assert wrong.keys() == places
    assert "token 7 is outside 0..4" in wrong[1]


def test_check_finds_nothing_wrong_with_what_is_right() -> None:
    assert Classification().check(LOGITS.shape, CLASSES) == {}
    assert LanguageModeling().check(TOKEN_LOGITS.shape, TOKENS) == {}

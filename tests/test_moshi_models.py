"""Tiny models: real classes whose shapes are those of the big ones, the same for the same seed."""

from dataclasses import replace

import pytest
import torch

from trunkline_runtime.engine.moshi.models import (
    END_OF_PAD,
    PAD,
    ModelError,
    limit_context,
    user_codebooks,
)
from trunkline_runtime.engine.moshi.tiny import tiny


def test_tiny_models_have_the_shape_of_the_big_ones() -> None:
    models = tiny(0)
    assert models.stt is not None
    assert (user_codebooks(models.lm), models.lm.dep_q) == (8, 8)
    assert (user_codebooks(models.stt), models.stt.dep_q) == (32, 0)
    assert models.mimi.num_codebooks == 32
    assert models.mimi.frame_size == 1920
    assert models.mimi.cardinality == models.lm.card == models.stt.card
    assert models.text_tokenizer.vocab_size() == models.lm.text_card
    assert models.text_tokenizer.id_to_piece([END_OF_PAD, PAD]) == ["<unk>", "<pad>"]


def test_the_same_seed_makes_the_same_weights_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = tiny(3), tiny(3), tiny(4)
    assert torch.equal(torch.rand(3), expected)
    weights = [[p.sum().item() for p in m.lm.parameters()] for m in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_the_context_can_only_shrink() -> None:
    lm = tiny(0, context_frames=25).lm
    limit_context(lm, 10)
    with lm.streaming(1):
        states = lm.get_streaming_state()
    rings = {s.kv_cache.capacity for s in states.values() if hasattr(s, "kv_cache")}
    assert rings == {10}
    for frames in (0, 11):
        with pytest.raises(ModelError, match=r"not within the model's 1…10 .*contextSeconds"):
            limit_context(lm, frames)


def test_models_that_do_not_belong_together_are_refused() -> None:
    models = tiny(0)
    with pytest.raises(ModelError, match="tokenizer"):
        replace(models, stt_tokenizer=None)
    models.mimi.quantizer.rvq_rest.max_n_q = 3
    with pytest.raises(ModelError, match="4 codebooks and the language models take 32"):
        replace(models)

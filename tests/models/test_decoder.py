"""The decoder against itself: heads, layouts, memory. Against transformers: test_families.py."""

from dataclasses import replace

import numpy as np


def test_a_new_reward_model_is_the_language_model_under_a_head_of_zeros(mindspore, micro_config):
    from mindrlhf.models.decoder import Decoder, random_weights

    config = replace(micro_config, head="score")
    language = random_weights(micro_config, 0)
    for name, array in Decoder(config, random_weights(config, 0)).tensors():
        np.testing.assert_array_equal(array, 0 if name == "score.weight" else language(name))


def test_weights_round_trip_in_both_layouts(mindspore, micro_decoder, micro_config):
    from mindrlhf.models.decoder import Decoder, random_weights

    decoding = Decoder(micro_config, micro_decoder.weights, transposed=True)
    for (name, one), (other, two) in zip(micro_decoder.tensors(), decoding.tensors(), strict=True):
        assert name == other
        np.testing.assert_array_equal(one, two)
    fresh = random_weights(micro_config, 7)
    decoding.load(fresh)
    for name, array in decoding.tensors():
        np.testing.assert_array_equal(array, fresh(name))


def test_two_decoders_do_not_share_memory(mindspore, micro_decoder, micro_config):
    from mindrlhf.models.decoder import Decoder

    copy = Decoder(micro_config, micro_decoder.weights)
    before = copy.weights("model.norm.weight").copy()
    micro_decoder.load(lambda name: micro_decoder.weights(name) + 1)
    np.testing.assert_array_equal(copy.weights("model.norm.weight"), before)

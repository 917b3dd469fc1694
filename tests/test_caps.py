"Caps from a batch: every one where it should be, or none moved."
import copy

import pytest
import torch
from torch import nn

from learned_relu.batchnorm import fuse_batchnorms
from learned_relu.caps import caps_from_data
from learned_relu.layers import LearnedRelu


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), LearnedRelu(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), LearnedRelu())


@pytest.mark.parametrize('share', [.01, .1, .5])
def test_the_share_is_clipped_and_nothing_else_moves(share):
    model, x = network().eval(), torch.randn(16, 3, 12, 12)
    for i in 1, 4: model[i].bias.data += 1 # so that half of what comes out is above 0
    before, draws = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    caps_from_data(model, x, share)
    assert not model.training and torch.equal(draws, torch.get_rng_state())
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {f'{i}.maxv{o}' for i in (2, 5) for o in ('', '_avg')}
    model.train()
    seen = []
    for i in 2, 5: model[i].register_forward_hook(lambda m, a, y: seen.append(m.clipped(y).float().mean((0, 2, 3) if m.num_parameters > 1 else None)))
    model(x)
    for o in seen: assert torch.allclose(o, torch.tensor(share), atol=.002) # each channel on its own, and the layer as a whole


def test_fused_with_batchnorm_they_are_the_same():
    apart, x = network(), torch.randn(16, 3, 12, 12)
    apart[0].weight.data *= 20  # so that it matters what is looked at
    fused = copy.deepcopy(apart)
    fuse_batchnorms(fused, x)
    before = {k: v.clone() for k, v in fused.named_buffers() if 'avg' not in k}
    for a, b in zip(caps_from_data(apart, x).values(), caps_from_data(fused, x).values(), strict=True): torch.testing.assert_close(a, b)
    assert all(torch.equal(before[k], v) for k, v in fused.named_buffers() if k in before)


def test_a_channel_that_gives_nothing_above_zero_keeps_its_cap():
    model, x = network(), torch.randn(4, 3, 12, 12)
    model[1].bias.data[2] = -50
    caps = caps_from_data(model, x)
    assert [(o == 10).item() for o in caps['2']] == [False, False, True, False] and ((0 < caps['2']) & (caps['2'] < 4))[[0, 1, 3]].all()


def test_where_no_cap_would_be_above_zero_none_is_moved_and_it_is_said():
    model = network()
    with torch.no_grad():
        for o in model[1], model[4]: o.bias.fill_(-50)
    with pytest.raises(ValueError, match='share is 0.01, and no cap would be above 0'): caps_from_data(model, torch.randn(4, 3, 12, 12))
    assert (model[2].maxv == 10).all() and (model[5].maxv == 10).all()


def test_a_batch_that_is_not_finite_moves_no_cap():
    model, x = network(), torch.randn(4, 3, 12, 12)
    model[3].bias.data[0] = float('nan') # the first layer is set by then, the second is not
    with pytest.raises(ValueError, match="not finite in 5: look at x"): caps_from_data(model, x)
    assert (model[2].maxv == 10).all() and (model[5].maxv == 10).all() and not model[2]._forward_pre_hooks

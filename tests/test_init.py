"Caps from a batch: every one where it should be, or none moved."
import pytest
import torch
from torch import nn

from learned_relu.init import caps_from_data
from learned_relu.layers import LearnedRelu


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), LearnedRelu(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), LearnedRelu())


@pytest.mark.parametrize('share', [.01, .1, .5])
def test_the_share_is_clipped_and_nothing_else_moves(share):
    model, x = network().eval(), torch.randn(16, 3, 12, 12)
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


def test_a_batch_that_is_not_finite_moves_no_cap():
    model, x = network(), torch.randn(4, 3, 12, 12)
    model[3].bias.data[0] = float('nan') # the first layer is set by then, the second is not
    with pytest.raises(ValueError, match="not finite in 5: look at x"): caps_from_data(model, x)
    assert (model[2].maxv == 10).all() and (model[5].maxv == 10).all() and not model[2]._forward_pre_hooks

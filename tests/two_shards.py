"FSDP2 over as many processes as there are: each says what its model holds. Argument: a folder to write to."
import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from learned_relu.layers import LearnedClip, LearnedRelu

dist.init_process_group('gloo')
rank, mesh = dist.get_rank(), dist.init_device_mesh('cpu', (dist.get_world_size(),))
torch.manual_seed(0)
leak = torch.rand(8)


def make(): return nn.Sequential(nn.Linear(4, 8), LearnedRelu(8, leak=leak), nn.Linear(8, 8), LearnedClip(), nn.Linear(8, 2))
def shared(m): return fully_shard(m, mesh=mesh)


def train(m, x, y):
    opt = torch.optim.SGD(m.parameters(), lr=.5)
    for _ in range(3):
        opt.zero_grad()
        (m.train()(x) - y).pow(2).mean().backward()
        opt.step()
        for o in m[1], m[3]: o.update_averages(.5)
        m.eval()(x)
    return m


x, y, alone = torch.randn(6, 4), torch.randn(6, 2), make()
with torch.device('meta'): m = make()
shared(m).to_empty(device='cpu')
for o in m: o.reset_parameters()
started = m[1].leak.full_tensor().tolist()
whole = StateDictOptions(full_state_dict=True)
set_model_state_dict(m, copy.deepcopy(alone.state_dict()), options=whole)  # which may take tensors as they are
train(alone, x, y), train(m, x, y)
again = shared(make())
again.load_state_dict(m.state_dict())
full = copy.deepcopy(get_model_state_dict(m, options=whole))
fresh = shared(make())
set_model_state_dict(fresh, full, options=whole)
evaluated = [o.eval()(x).tolist() for o in (alone, m, again, fresh)]
m.load_state_dict({k: v for k, v in again.state_dict().items() if 'avg' not in k and 'averaged' not in k}, strict=False)
forgotten = [[int(o.num_averaged), torch.equal(o._buffers[f'{o.learn[0]}_avg'], getattr(o, o.learn[0]).full_tensor())] for o in (m[1], m[3])]
say = dict(started=started, leak=leak.tolist(), evaluated=evaluated, forgotten=forgotten, local=m[1].leak.to_local().numel(),
           averages={k: v.tolist() for k, v in full.items() if k.endswith('avg')}, keys=sorted(full) == sorted(alone.state_dict()),
           alone={k: v.tolist() for k, v in alone.state_dict().items() if k.endswith('avg')})
Path(sys.argv[1], f'{rank}.json').write_text(json.dumps(say))
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # all is said: at the interpreter's own end a thread of Gloo now and then aborts it (torch 2.14.1)

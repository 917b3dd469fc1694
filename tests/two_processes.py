"One run by as many processes as there are; each writes down what its model holds. Arguments: a folder of images, a folder to write to."
import json
import sys
from pathlib import Path

from fastai.torch_core import num_distrib, rank_distrib

from learned_relu.bench.arms import Arm
from learned_relu.bench.data import Source
from learned_relu.bench.distributed import first
from learned_relu.bench.recipe import Recipe
from learned_relu.bench.run import fit, make_learner
from learned_relu.params import act_layers, act_params

data, out = map(Path, sys.argv[1:])
recipe = Recipe(data=data.name, size=16, bs=4, epochs=2)
learn = make_learner(Arm('learned+averages+freeze'), 0, recipe, Source(data, 16))
seen, half = [], []
freeze = learn.freeze_act_params
before = type(freeze).before_step
def noted(self):
    before(self)
    seen.append(float(self.learn.xb[0].mean()))
    if self._pinned is not None and not half: half.append([v.tolist() for _, room in self._pinned for v in room.views])
type(freeze).before_step = noted
fit(learn, recipe)
say = dict(rank=rank_distrib(), processes=num_distrib(), first=first(), seen=seen, half=half[0],
           params=[o.param.tolist() for o in act_params(learn.model)], telemetry=len(learn.act_telemetry.frame()),
           averaged=[int(o.num_averaged) for o in act_layers(learn.model).values()],
           averages=[getattr(o.layer, f'{o.kind}_avg').tolist() for o in act_params(learn.model)],
           loaders=[type(o).__name__ for o in learn.dls.loaders])
(out/f'{rank_distrib()}.json').write_text(json.dumps(say))

"Imports point inward, and what is promised can be imported."
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import learned_relu

ROOT = Path(learned_relu.__file__).parent
TORCH = ('_files _torch reference kernels.layout kernels.build kernels.eager kernels.cpu kernels.cpu_batchnorm kernels.triton '
         'kernels.dispatch functional surrogate act_layer layers batchnorm '
         'params trace patch plot history caps').split()
modules = sorted(o.relative_to(ROOT) for o in ROOT.rglob('*.py') if o.name not in ('__init__.py', '_modidx.py', 'all.py'))


def ring(name): return 2 if name.startswith('bench') else 0 if name in TORCH or name == 'kernels' else 1


def imported(path):
    for node in ast.walk(ast.parse((ROOT/path).read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            # nbdev exports `from learned_relu.layers import` as a relative import
            inside = ['learned_relu', *path.parts[:-1]][:len(path.parts) + 1 - node.level] if node.level else []
            yield '.'.join([*inside, node.module or node.names[0].name]), [a.name for a in node.names]
        elif isinstance(node, ast.Import): yield from ((a.name, []) for a in node.names)


@pytest.mark.parametrize('path', modules, ids=str)
def test_imports_point_inward(path):
    me = '.'.join(path.with_suffix('').parts)
    for module, names in imported(path):
        assert '*' not in names, f'{me} imports a star from {module}'
        if module.startswith('learned_relu.'):
            other = module.removeprefix('learned_relu.')
            assert ring(other) <= ring(me), f'{me} imports {other}, which is further out'
            if me.startswith('callback.'): assert other == 'callback.core' or not other.startswith('callback.')
        if ring(me) == 0: assert module.split('.')[0] not in ('fastai', 'fastcore', 'pandas', 'scipy')


def test_the_torch_ring_works_without_fastai():
    code = ('import sys; sys.modules["fastai"] = sys.modules["fastcore"] = None\n'
            + '\n'.join(f'import learned_relu.{o}' for o in TORCH)
            + '\nimport torch; from torch import nn; from learned_relu.patch import patch_relus'
              '\nm = nn.Sequential(nn.Linear(2, 3), nn.ReLU()); patch_relus(m); m(torch.rand(4, 2)).sum().backward()'
              '\nassert m[1].sub.grad is not None')
    subprocess.run([sys.executable, '-c', code], check=True)


def test_everything_can_be_imported_without_the_extra():
    code = ("import sys\nfor o in 'accelerate statsmodels mlxtend tomli tomli_w'.split(): sys.modules[o] = None"
            "\nimport learned_relu.all as o; assert o.Recipe().size == 28 and o.EpochCheckpoint and o.on_all_processes")
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


def test_public_names():
    import learned_relu.all as everything
    names = '''learned_relu learned_relu_reference LearnedRelu GeneralRelu act_params reset_averages patch_relus unpatch_relus
    surrogate_gradient leaky_grad_relu learned_clip symmetric_clip learned_threshold LeakyGradRelu LearnedClip SymmetricClip LearnedThreshold
    ClampActParams EMAActParams FreezeActParams ActTelemetry NoDecayActParams ActGradPenalty learned_xresnet
    learned_relu_train learned_relu_compare learned_relu_speed learned_relu_report'''.split()
    assert not [o for o in names if not hasattr(everything, o)]
    from fastai.learner import Learner
    assert Learner.to_learned_relu and Learner.to_relu

"Imports point inward, and what is promised can be imported."
import ast
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import learned_relu

ROOT = Path(learned_relu.__file__).parent
TORCH = ('_files _torch reference kernels.layout kernels.library kernels.build kernels.eager kernels.cpu kernels.cpu_batchnorm '
         'kernels.node kernels.dispatch functional surrogate flat averages act_layer layers batchnorm '
         'params guard flow sites rewrite trace calls family trained plan swap patch_report profile patch plot spread history caps standard shift '
         'fold').split()
TRITON = 'kernels.tiles kernels.triton kernels.triton_norm kernels.triton_batchnorm'.split()
TORCH += TRITON
ABSENT = () if find_spec('triton') else TRITON  # Triton comes with PyTorch on Linux
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
            + '\n'.join(f'import learned_relu.{o}' for o in TORCH if o not in ABSENT)
            + '\nimport torch; from torch import nn; from learned_relu.patch import patch_relus'
              '\nm = nn.Sequential(nn.Linear(2, 3), nn.ReLU()); patch_relus(m); m(torch.rand(4, 2)).sum().backward()'
              '\nassert m[1].sub.grad is not None')
    subprocess.run([sys.executable, '-c', code], check=True)


def test_everything_can_be_imported_without_the_extra():
    names = [o.with_suffix('').as_posix().replace('/', '.') for o in modules]
    names = [o for o in names if o not in (*ABSENT, 'bench.on_ray')]  # which is imported when it is asked for
    code = ("import sys\nfor o in 'accelerate fastjsonschema statsmodels mlxtend tomli tomli_w ray'.split(): sys.modules[o] = None"
            + '\nimport learned_relu.all\n' + '\n'.join(f'import learned_relu.{o}' for o in names)
            + '\nfrom learned_relu.bench.distributed import on_all_processes'
              '\nfrom learned_relu.bench.recipe import Recipe'
              '\nfrom learned_relu.bench.resume import EpochCheckpoint'
              '\nassert Recipe().size == 28 and EpochCheckpoint and on_all_processes')
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


def test_a_command_without_the_extra_says_what_to_install(tmp_path):
    shutil.copytree(ROOT.parent/'benchmarks'/'records'/'accuracy'/'2026-11-26-digits-mlp-search', tmp_path/'runs')
    code = ("import sys; sys.modules['fastjsonschema'] = None\nfrom learned_relu.bench.commands.{0} import learned_relu_{0} as f\n"
            f"f({str(tmp_path/'runs')!r}, out={str(tmp_path/'out')!r})")
    for command in 'report', 'harvest':
        done = subprocess.run([sys.executable, '-c', code.format(command)], capture_output=True, text=True)
        assert done.returncode == 1 and 'Traceback' not in done.stderr and 'pip install "learned_relu[bench]"' in done.stderr, done.stderr[-500:]


def fresh(code):
    "What a new process prints, in words"
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, capture_output=True, text=True).stdout.split()


LOADED = '\nimport sys; print(*sorted(o for o in sys.modules if "." not in o or o.startswith("learned_relu.")))'


def test_importing_the_package_loads_nothing_of_it():
    ours = set(fresh('import learned_relu' + LOADED)) - set(fresh(LOADED))
    assert ours == {'learned_relu'}, 'neither torch nor a module of ours'


def test_each_name_of_the_package_comes_without_fastai():
    loaded = fresh('from learned_relu import LearnedRelu' + LOADED)
    assert {'torch', 'learned_relu.layers'} <= set(loaded) and not {'fastai', 'fastcore', 'matplotlib', 'pandas'} & set(loaded)
    stars = fresh('import sys; sys.modules["fastai"] = sys.modules["fastcore"] = None\nfrom learned_relu import *\nprint(*dir())')
    assert {o for o in stars if not o.startswith('_')} == {*learned_relu.__all__, 'sys'}
    assert set(learned_relu.__all__) <= set(dir(learned_relu))
    with pytest.raises(AttributeError, match="no attribute 'ClampActParams': names that need fastai are in learned_relu.all"):
        _ = learned_relu.ClampActParams


def test_no_name_of_fastai_is_taken_away_and_nothing_of_the_bench_is_loaded():
    stars = 'from fastai.vision.all import *\nhave = dict(globals())\nfrom learned_relu.all import *\n'
    assert fresh(stars + 'print(*[k for k, v in have.items() if globals()[k] is not v])') == []
    assert fresh(stars + 'print(first([3, 4]))') == ['3']
    loaded = fresh('import learned_relu.all' + LOADED)
    assert 'learned_relu.callback.clamp' in loaded and not [o for o in loaded if o.startswith('learned_relu.bench')]


def test_public_names():
    import learned_relu.all as everything
    from learned_relu.bench.commands.compare import learned_relu_compare
    from learned_relu.bench.commands.report import learned_relu_report
    from learned_relu.bench.commands.speed import learned_relu_speed
    from learned_relu.bench.commands.train import learned_relu_train
    assert all(map(callable, (learned_relu_train, learned_relu_compare, learned_relu_speed, learned_relu_report)))
    names = '''learned_relu learned_relu_reference LearnedRelu GeneralRelu act_params reset_averages patch_relus unpatch_relus
    surrogate_gradient leaky_grad_relu learned_clip symmetric_clip learned_threshold LeakyGradRelu LearnedClip SymmetricClip LearnedThreshold
    ClampActParams EMAActParams FreezeActParams ActTelemetry NoDecayActParams ActGradPenalty learned_xresnet'''.split()
    assert not [o for o in names if not hasattr(everything, o)]
    from fastai.learner import Learner
    assert Learner.to_learned_relu and Learner.to_relu
    public = {k: v for k, v in vars(everything).items() if not k.startswith('_')}
    outer = {k for k, v in public.items() if ring(v.__module__.removeprefix('learned_relu.')) == 1}
    assert set(public) == {*learned_relu.__all__} | outer, 'a name is of the one list, or of the fastai ring'
    assert all(v.__module__.startswith('learned_relu.') and v.__doc__ for v in public.values())

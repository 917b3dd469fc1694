"Every public name of the library."
from learned_relu.callback.clamp import *
from learned_relu.callback.core import *
from learned_relu.callback.decay import *
from learned_relu.callback.ema import *
from learned_relu.callback.freeze import *
from learned_relu.callback.telemetry import *
from learned_relu.functional import *
from learned_relu.layers import *
from learned_relu.learner import *
from learned_relu.params import *
from learned_relu.patch import *
from learned_relu.plot import *
from learned_relu.xresnet import *

"What users of fastai need: `from learned_relu.all import *` takes no name of `fastai.vision.all` away."
from learned_relu import *  # the names that need torch alone, listed there
from learned_relu import learner as _learner  # gives `Learner` its `to_learned_relu` and `to_relu`
from learned_relu.callback.clamp import ClampActParams
from learned_relu.callback.core import ActCallback
from learned_relu.callback.decay import NoDecayActParams
from learned_relu.callback.ema import EMAActParams
from learned_relu.callback.freeze import FreezeActParams
from learned_relu.callback.log import LogActParams
from learned_relu.callback.penalty import ActGradPenalty
from learned_relu.callback.telemetry import ActTelemetry
from learned_relu.xresnet import learned_xresnet, plain_xresnet

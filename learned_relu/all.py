"Every public name of the library."
from learned_relu.functional import *
from learned_relu.layers import *
from learned_relu.params import *
from learned_relu.patch import *

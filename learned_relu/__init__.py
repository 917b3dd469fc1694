__version__ = "0.0.1"

# The names that need torch alone, by module. Each is loaded when it is asked for: importing the package costs nothing
_rooms = {
    'functional': 'learned_relu',
    'reference': 'learned_relu_reference',
    'kernels.dispatch': 'impl',
    'surrogate': 'surrogate_gradient leaky_grad_relu learned_clip symmetric_clip learned_threshold',
    'act_layer': 'ActLayer',
    'layers': 'LearnedRelu GeneralRelu LearnedClip SymmetricClip LearnedThreshold LeakyGradRelu',
    'batchnorm': 'bn_learned_relu BnLearnedRelu',
    'params': 'act_params act_layers reset_averages',
    'patch': 'PatchReport patch_relus unpatch_relus',
    'fold': 'fold_plan fold_relus',
    'plot': 'plot_layer plot_model',
    'profile': 'Profile harvest save_profile load_profile plot_profile',
    'caps': 'caps_from_data',
}
_room_of = {name: room for room, names in _rooms.items() for name in names.split()}
__all__ = list(_room_of)

def __getattr__(name):
    if name not in _room_of:
        raise AttributeError(f"module 'learned_relu' has no attribute {name!r}: names that need fastai are in "
                             'learned_relu.all, those of comparisons in the modules of learned_relu.bench')
    from importlib import import_module
    return getattr(import_module(f'learned_relu.{_room_of[name]}'), name)

def __dir__(): return sorted([*globals(), *__all__])

"""The optimizers, a file each: optax's, put together as the field's recipes ask.

NAME.py has make(learning_rate, weight_decay, mask, *, its options) -> optax transformation, where
`mask` is params -> bools: what decays. One that looks at a whole tensor's norm or shape wraps it in
`trainer.layerwise.per_layer`. A config loads the one that it names.
"""

from trainer.fields import Modules

# In the order that --help tells of them; of an option of several the first one's account is given.
OPTIMIZERS = ("adamw", "sgd", "lars", "lamb", "adafactor", "lion", "muon")
OPTIONS = Modules("trainer.optimizers", OPTIMIZERS)

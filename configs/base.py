"""Defaults of every recipe. A section is the keyword arguments of the function beside it."""

from ml_collections import ConfigDict


def get_base() -> ConfigDict:
  """A config without a recipe: `configs/NAME.py` fills in the sections.

  Durations (total, warmup, every, ...) end in _steps, _epochs or _examples; give one of them.
  """
  return ConfigDict(dict(
    seed=0,
    dtype="float32",  # of computation: float32 or bfloat16; parameters are always float32
    accumulate=1,  # parts that a batch's gradient is computed in, one after another
    ema_decay=0.0,  # of the running average of parameters that evaluation uses; 0 = none
    ema_gamma=0.0,  # power-function average instead, of a longer and longer past; 0 = none
    eval_batch_size=256,
    wandb=False,  # log to Weights & Biases too
    own_data=False,  # whether what the data cannot have is settled or left out, and said, in the
    #                  place of an error; set by a data.source of another kind than the recipe's
    optional_evals=(),  # of evals, those of the recipe that own data may do without
    expect="",  # what the recipe reaches, shown at the start
    log_every_steps=20,
    init={},  # trainer/networks.py: Init
    model={},  # models/NAME.py: make
    method={},  # methods/NAME.py: make
    data={},  # input_pipeline/batches.py: open_data
    augment={},  # input_pipeline/augment/NAME.py: make; images.py or latents.py without a name
    optimizer={},  # trainer/optimizer.py: make
    schedule={},  # trainer/schedule.py: make
    mesh=dict(data=-1, fsdp=1, tensor=1),  # trainer/sharding.py: make_mesh
    checkpoint=dict(keep=2),  # trainer/store.py: Checkpoints
    evals={},  # evaluators/NAME.py: evaluate
  ))


def own_data(config: ConfigDict) -> None:
  """Takes from a recipe what is true of its own data alone, where it is used on other data."""
  config.own_data, config.expect = True, ""
  _leave_out(config.data, "favour", "favour_share", "train_split", "eval_split")
  config.data.batch_at_most = True
  for section in config.evals.values():
    _leave_out(section, "split", "classes", "templates", "unique")


def _leave_out(section: ConfigDict, *names: str) -> None:
  for name in set(names) & set(section):
    del section[name]

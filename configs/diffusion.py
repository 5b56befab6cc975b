"""Diffusion and flow matching, class-conditional.

  python train.py --config=configs/diffusion.py          flow matching on embedded digits, minutes
                                                         on two CPU cores
  python train.py --config=configs/diffusion.py:vp       the same with a variance preserving path
  python train.py --config=configs/diffusion.py:smoke    in seconds

Latents of ImageNet 256 x 256, stored by an autoencoder of stride 8 (Stable Diffusion's):
--config.data.source=folder:PATH of .npy or .npz moments in class folders, or a TFDS set of them.

  imagenet_dit_b4, imagenet_dit_xl2   DiT (2212.09748 sec. 4). Published FID, 250 DDPM steps: B/4
                                      68.4 after 400,000 steps (table 4); XL/2 9.62 after 7,000,000,
                                      2.27 with guidance 1.5 (table 2)
  imagenet_sit_xl2                    SiT (2401.08740): linear path, velocity. Published FID, 250
                                      steps: 8.3 with the SDE, 2.06 with guidance 1.5

The published runs were in float32, drew times independently, and mirrored half of the images before
they encoded them: for that, store the latents of the mirrored images as well.
"""

from configs.base import get_base

IMAGENET = {"imagenet_dit_b4": ("B/4", 400_000), "imagenet_dit_xl2": ("XL/2", 7_000_000),
            "imagenet_sit_xl2": ("XL/2", 7_000_000)}
VARIANTS = ("", "vp", "smoke", *IMAGENET)


def get_config(variant: str = ""):
  config = get_base()
  config.method = dict(name="diffusion", label_dropout=0.1)
  if variant in IMAGENET:
    config = imagenet(config, *IMAGENET[variant])
    return sit(config) if "sit" in variant else dit(config)
  return embedded(config, vp=variant == "vp", smoke=variant == "smoke")


def embedded(config, vp: bool, smoke: bool):
  """Digits of 16 pixels in the fonts of one family."""
  config.total_steps, config.eval_every_steps = 2400, 800
  config.ema_decay = 0.995
  config.expect = "0.98 to 1.00 of 1,000 samples recognised, in 50 steps and in 10"
  config.model = dict(name="dit", patch=4, width=128, depth=4, heads=4, mlp_dim=512)
  config.method.update(prediction="x0", weighting="uniform")
  if vp:
    config.method.update(path="vp_cosine", samples=dict(
      sample=dict(sampler="dpmpp_2m", grid="log_snr", steps=50, grid_options=dict(start=0.995)),
      sample_10=dict(sampler="dpmpp_2m", grid="log_snr", steps=10, grid_options=dict(start=0.995))))
  else:
    config.method.update(path="linear", samples=dict(
      sample=dict(sampler="euler", steps=50), sample_10=dict(sampler="heun", steps=10)))
  config.data = dict(source="glyphs/digits_16", batch_size=64)
  # As much as a neighbour of the real images on 16 pixels bears and is still recognised.
  config.augment = dict(affine=dict(degrees=2, translate=0.03, scale=(0.95, 1.05), shear=3))
  config.optimizer = dict(name="adamw", lr=2e-3, b2=0.95, weight_decay=0.0, clip_norm=1.0)
  config.schedule = dict(name="cosine", warmup_steps=100)
  config.evals = dict(samples=dict(predictions=("sample", "sample_10"), count=1000))
  if smoke:
    config.expect = ""
    config.total_steps, config.eval_every_steps, config.log_every_steps = 6, 3, 2
    config.model.update(width=32, depth=2, heads=2, mlp_dim=64)
    config.method.samples = dict(sample=dict(sampler="heun", steps=2))
    config.data.batch_size = 16
    config.schedule.warmup_steps = 2
    config.evals = dict(samples=dict(predictions=("sample",), count=20, per_class=2))
  return config


def imagenet(config, variant: str, total_steps: int):
  """What both papers share: AdamW at a constant rate, no decay, an average of parameters."""
  config.dtype = "bfloat16"
  config.total_steps, config.eval_every_steps = total_steps, 50_000
  config.log_every_steps, config.checkpoint.every_steps = 100, 10_000
  config.ema_decay = 0.9999
  config.model = dict(name="dit", variant=variant, channels=4, num_classes=1000, scan=True)
  config.data = dict(source="folder:imagenet_latents", latents="moments", batch_size=256,
                     workers=16)
  config.augment = dict(image_size=32, scale=0.18215)
  config.optimizer = dict(name="adamw", lr=1e-4, weight_decay=0.0)
  config.schedule = dict(name="constant")
  config.evals = dict(samples=dict(guidance=(1.0, 1.5, 4.0), per_class=2, count=0))
  return config


def dit(config):
  """Linear betas, 1000 steps, noise predicted, variance learned; 250 of them as its code takes."""
  config.model.learn_sigma = True
  config.method.update(path="vp_discrete", prediction="eps", samples=dict(
    sample=dict(sampler="ddpm", sampler_options=dict(variance="learned"), grid="discrete",
                grid_options=dict(spacing="respaced"), steps=250, guidance_channels=3)))
  return config


def sit(config):
  """Euler-Maruyama as its repository has it, w_t = 2 sigma_t, a last step from 0.04; and an ODE.

  Its network is given times in [0, 1] as they are.
  """
  config.method.update(path="linear", prediction="velocity", time_scale=1.0, samples=dict(
    sample=dict(sampler="euler_maruyama", sampler_options=dict(diffusion="sigma", scale=2.0),
                grid_options=dict(end=0.04), steps=250, guidance_channels=3),
    sample_ode=dict(sampler="heun", steps=125, guidance_channels=3)))
  return config

"""Waveforms become spectrograms on the device, moved in time while training."""

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.augment import Augment


def make(*, window: int = 128, shift: int = 32) -> Augment:
  """"wave" [b, samples] -> log magnitudes [b, frames, window / 2 + 1].

  Args:
    window: samples that a frame sees; frames overlap by half.
    shift: samples that training rolls a waveform by, at most.
  """
  def spectrogram(wave):
    starts = np.arange(0, wave.shape[1] - window + 1, window // 2)
    frames = wave[:, starts[:, None] + np.arange(window)] * np.hanning(window).astype(np.float32)
    return jnp.log1p(jnp.abs(jnp.fft.rfft(frames)))

  def train(rng, batch):
    shifts = jax.random.randint(rng, batch["wave"].shape[:1], 0, shift + 1)
    return {**batch, "wave": spectrogram(jax.vmap(jnp.roll)(batch["wave"], shifts))}

  return Augment(train, lambda batch: {**batch, "wave": spectrogram(batch["wave"])}, np.asarray)

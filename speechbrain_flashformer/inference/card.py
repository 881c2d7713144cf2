"""The model card of a packed model, with the front matter of a model hub."""

import csv
import json
import math

from speechbrain_flashformer import __version__
from speechbrain_flashformer.training.scores import SUMMARY

CARD = """\
---
library_name: speechbrain
pipeline_tag: audio-to-audio
tags:
  - speech-separation
  - speechbrain
  - flashformer
{index}---

# {name}

Separates single-channel recordings of {num_spks} speakers at {sample_rate} Hz;
{parameters:.1f} million parameters. Made by speechbrain-flashformer {version}.

## Use

```sh
pip install speechbrain-flashformer
flashformer separate mixture.wav -o separated --model {name}{option}
```

```python
from speechbrain_flashformer.inference import FlashFormerSeparation

model = FlashFormerSeparation.from_hparams("{name}"{argument})
sources = model.separate_file("mixture.wav")  # [1, time, speakers]
```

`{name}` is this folder. For the same model on the Hugging Face hub write
`hf:OWNER/{name}`. On a GPU: `--device cuda`, in Python
`run_opts={{"device": "cuda"}}`.

## Results

- validation: SI-SNR {validation:.2f} dB{epoch}
{test}
## Training data

To be written by the author of the model: the data, and their licenses.

## Limits

To be written by the author of the model: what it is not good at.

## Citation

```
@software{{flashformer,
  title = {{FlashFormer: a speech separation mask network for SpeechBrain}},
  author = {{The FlashFormer developers}},
  version = {{{version}}}
}}
```
"""

INDEX = """\
model-index:
  - name: {quoted}
    results:
      - task:
          name: Speech separation
          type: audio-to-audio
        dataset:
          name: {mixtures} test mixtures of the training run
          type: mixtures
        metrics:
          - name: SI-SNRi (dB)
            type: si-snri
            value: {si_snr_i:.2f}
          - name: SDRi (dB)
            type: sdri
            value: {sdr_i:.2f}
"""


def model_card(name, numbers, run, meta, trust, tested):
    """Return the text of a model card.

    Arguments
    ---------
    name : str
        Name of the model's folder.
    numbers : dict
        ``num_spks``, ``sample_rate`` in Hz, and ``parameters`` in millions.
    run : Path
        Output folder of the training. The card has the results of its test, if
        there was one.
    meta : dict
        Meta of the checkpoint: ``si-snr``, the validation loss, and ``epoch``.
    trust : bool
        Whether the model runs code of its own, so that users must trust it.
    tested : bool
        Whether the test of the run tested these weights. If not, the card has
        no test results.

    Returns
    -------
    str
        Markdown with front matter.
    """
    index = test = ""
    if tested and (scores := _test_scores(run)):
        index = INDEX.format(quoted=json.dumps(name), **scores)
        test = "- test, {mixtures} mixtures: SI-SNRi {si_snr_i:.2f} dB, "
        test += "SDRi {sdr_i:.2f} dB\n"
        test = test.format(**scores)
    return CARD.format(
        name=name,
        **numbers,
        version=__version__,
        index=index,
        validation=-meta["si-snr"],
        epoch=f" at epoch {meta['epoch']}" if "epoch" in meta else "",
        test=test,
        option=" --trust" if trust else "",
        argument=", trust=True" if trust else "",
    )


def _test_scores(run):
    """Mean scores of the test of a run, None before its end."""
    file = run / "test_results.csv"
    if not file.is_file():
        return None
    with file.open(newline="", encoding="utf-8") as rows:
        table = {row["snt_id"]: row for row in csv.DictReader(rows)}
    # A test that was interrupted has no mean.
    if "avg" not in table:
        return None
    si_snr_i, sdr_i = (float(table["avg"][x]) for x in ("si-snr_i", "sdr_i"))
    if not math.isfinite(si_snr_i + sdr_i):
        return None
    mixtures = len(table) - len(SUMMARY)
    return {"mixtures": mixtures, "si_snr_i": si_snr_i, "sdr_i": sdr_i}

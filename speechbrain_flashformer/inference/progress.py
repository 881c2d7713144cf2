"""Report how much of a recording is separated.

Axes: C channels, S speakers, n samples.
"""

from tqdm import tqdm


class Progress:
    """A stage that passes sources on and reports their duration.

    Use it in a with statement, which ends the progress bar.

    Arguments
    ---------
    sample_rate : int
        Sampling rate of the sources, Hz.
    seconds : float
        Duration of the recording.
    show : bool
        Whether to show a progress bar.
    callback : callable, optional
        Called with (seconds done, total seconds) after each part.

    Example
    -------
    >>> import torch
    >>> with Progress(8000, 2.0, False, print) as progress:
    ...     sources = progress.feed(torch.zeros(1, 2, 8000))
    1.0 2.0
    """

    def __init__(self, sample_rate, seconds, show, callback=None):
        self.sample_rate, self.seconds = sample_rate, seconds
        self.callback, self.samples, self.nothing = callback, 0, None
        self.bar = tqdm(
            total=round(seconds, 1),
            unit="s",
            disable=not show,
            dynamic_ncols=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def feed(self, sources):
        """Report the sources [C, S, n], and return them."""
        self.nothing, samples = sources[..., :0], sources.shape[2]
        if samples:
            self.samples += samples
            self.bar.update(samples / self.sample_rate)
            if self.callback:
                # Resampling can add samples at the end.
                done = min(self.samples / self.sample_rate, self.seconds)
                self.callback(done, self.seconds)
        return sources

    def flush(self):
        """Return no sources, [C, S, 0]."""
        return self.nothing

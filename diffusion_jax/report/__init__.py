"""One self-contained page about a run, or about several: report.html.

`write_report(workdir)` writes it; `--mode=report` and the end of training, sampling and evaluation do the same, and
`python -m diffusion_jax.report DIR...` compares runs. The page needs no network: its pictures,
numbers and scripts are inside.
"""

from diffusion_jax.report.write import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]

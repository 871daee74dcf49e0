"""`nemo-disco report`: one HTML page about one or several runs, and on request plots."""

from __future__ import annotations

import argparse


def main(options: argparse.Namespace) -> int:
    """Write the report (and the plots) and print their paths; with --watch, whenever a run writes metrics."""
    from nemo_disco.evaluation.report import watch, write_report

    if options.plots is not None:
        from nemo_disco.evaluation.plots import write_plots

        print("\n".join(map(str, write_plots(options.runs, options.plots))))
    if options.watch:
        return watch(options.runs, options.out)
    print(write_report(options.runs, options.out))
    return 0

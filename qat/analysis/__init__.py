"""What people look at after a run or a sweep: tables, plots and reports, read from `summary.json`.

- `qat.analysis.console`: tables for the terminal and the closing sentence of a run;
- `qat.analysis.plots`: figures;
- `qat.analysis.report`: one self-contained HTML file per run;
- `qat.analysis.sweep`: `results.csv` and a plot of a Hydra multirun.
"""

"""Loggers that need more than Lightning's have."""

import os
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only


class MLflow(MLFlowLogger):
    """Lightning's MLflow logger, which without a server writes files.

    MLflow 3 asks to be told that it may. A parameter has one value there, and a file's name is no folder's: so those of
    the configuration, which come first, are kept, and not those that Lightning finds in the module.

    Args:
        tracking_uri: of a server or a database; None writes files into `save_dir`.
        arguments: others of `MLFlowLogger`.

    Raises:
        ModuleNotFoundError: no MLflow; says what to install.
    """

    def __init__(self, tracking_uri: str | None = None, **arguments: Any) -> None:
        if tracking_uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            super().__init__(tracking_uri=tracking_uri, **arguments)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"logger=mlflow needs MLflow: pip install 'qat[mlflow]' ({error})") from error
        self._has_parameters = False

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the first that come."""
        if not self._has_parameters:
            super().log_hyperparams(params)
        self._has_parameters = True

"""The energy that a training took, estimated by codecarbon where that is installed."""

import importlib.metadata
import importlib.util
import logging

logger = logging.getLogger("train")


class EnergyMeter:
    """Measures this machine from now on. `is_on` is False in processes that share the machine with one that measures, and
    for runs of which only the last part would be measured."""

    def __init__(self, is_on: bool):
        self._tracker = None
        if is_on and importlib.util.find_spec("codecarbon"):
            from codecarbon import OfflineEmissionsTracker

            try:
                # Where the machine stands changes the estimate of carbon dioxide, which is not used.
                self._tracker = OfflineEmissionsTracker(
                    country_iso_code="USA", save_to_file=False, log_level="error", allow_multiple_runs=True
                )
                self._tracker.start()
            except Exception as error:  # an estimate is not worth a training
                logger.warning("codecarbon cannot measure here: %s", error)
                self._tracker = None

    def stop(self) -> dict:
        """{"energy_kwh", "codecarbon"} (its version), or nothing."""
        if self._tracker is None:
            return {}
        try:
            self._tracker.stop()
            kwh = self._tracker.final_emissions_data.energy_consumed
        except Exception as error:
            logger.warning("codecarbon could not measure: %s", error)
            return {}
        return {"energy_kwh": float(f"{kwh:.3g}"), "codecarbon": importlib.metadata.version("codecarbon")}

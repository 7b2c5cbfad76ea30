"""How long a step takes and how much memory it needs, before anything runs."""

from headway.predict.prediction import Memory, Prediction, StepTime
from headway.predict.profile import Profile
from headway.predict.step import Predictor, check_fit, predict

__all__ = ["Memory", "Prediction", "Predictor", "Profile", "StepTime", "check_fit", "predict"]

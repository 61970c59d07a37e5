"""AutoGPTQ's evaluation tasks: `woq.evaluation.tasks` under the name that scripts import."""

from woq.evaluation.tasks import LanguageModelingTask, SequenceClassificationTask, TextSummarizationTask

__all__ = ["LanguageModelingTask", "SequenceClassificationTask", "TextSummarizationTask"]

"""The COCO example: data, models, training, evaluation and figures behind the five commands."""

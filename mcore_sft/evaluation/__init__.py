"""A Hugging Face folder and a benchmark in, graded answers and a score out."""

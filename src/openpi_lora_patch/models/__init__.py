"""The models that openpi runs: stock transformers, converted. They import transformers; the patches do not."""

"""Train small vision-language models on the emitted shards: align, finetune, export, generate, eval."""

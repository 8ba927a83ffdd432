# %% [markdown]
# # Unlearning in Python
# This example uses the demo's data and models: fictional authors, and a model that knows all of them.

# %%
import sys
from pathlib import Path

import lightning.pytorch as pl
from transformers import AutoModelForCausalLM

from simnpo_pl.benchmarks import DemoData
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.models.loading import save_model
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import SimNPO

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-data")
EPOCHS = int(sys.argv[2]) if len(sys.argv) > 2 else 10
START = str(FOLDER / "start")

# %% [markdown]
# The data module makes data and models on first use; the module unlearns.

# %%
data = DemoData(path=str(FOLDER), model=START, effective_batch=8, eval=EvalOptions(max_new_tokens=32, generate_rows=20))
data.prepare_data()
module = UnlearningModule(START, objective=SimNPO(beta=0.65), forget_weight=0.25, lr=1e-3)

# %%
trainer = pl.Trainer(
    max_epochs=EPOCHS,
    gradient_clip_val=1.0,
    use_distributed_sampler=False,
    check_val_every_n_epoch=EPOCHS,
    num_sanity_val_steps=0,
    log_every_n_steps=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.validate(module, datamodule=data, verbose=False)
before = module.evaluation_result.values
trainer.fit(module, data)
after = module.evaluation_result.values

# %%
for name in ("forget/probability", "retain/probability", "model_utility"):
    print(f"{name}: {before[name]:.3f} -> {after[name]:.3f}")

# %% [markdown]
# The result is a Hugging Face model.

# %%
out = FOLDER / "unlearned"
save_model(module.policy, data.tokenizer, out)
print(f"written: {out}, {AutoModelForCausalLM.from_pretrained(out).num_parameters():,} parameters")

# %% [markdown]
# <!-- en -->
# # 11. Sharing
#
# A model is worth most when others can use it, whether or not they have this package.
# <!-- ja -->
# # 11. 共有
#
# モデルは、他の人が使えてこそ価値があります。このパッケージを持っていない人も使えるようにしましょう。

# %% [markdown]
# <!-- en -->
# ## One folder, three ways
#
# The folder of a model holds weights and configuration in diffusers' own format, the code of our pipeline and scheduler, and a card. So it loads with this package, with
# diffusers and the code in the folder (`trust_remote_code=True`), and with stock diffusers alone. We load it twice and compare one network call and one step:
# <!-- ja -->
# ## 一つのフォルダ、三つの読み込み方
#
# モデルのフォルダには、diffusers 標準の形式の重みと設定、パイプラインとスケジューラのコード、そしてモデルカードが入っています。そのため、このパッケージで、diffusers とフォルダ内のコード
# （`trust_remote_code=True`）で、あるいは素の diffusers だけでも読み込めます。二通りで読み込み、ネットワークの出力と 1 ステップの結果を比べます。

# %%
from pathlib import Path

import torch
from diffusers import DDPMPipeline

from ddpm_hf import DDPMPipelineCustom

MODEL = "walkthrough-digits"
assert Path(MODEL).is_dir(), "run the page about training first: it makes this model"
ours = DDPMPipelineCustom.from_pretrained(MODEL)
stock = DDPMPipeline.from_pretrained(MODEL)
print(*sorted(file.name for file in Path(MODEL).iterdir()), sep="\n")
print(type(stock.scheduler).__name__, "and", type(ours.scheduler).__name__)

x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 120
with torch.no_grad():
    of_ours, of_stock = ours.unet(x, t).sample, stock.unet(x, t).sample
assert torch.equal(of_ours, of_stock)
ours.scheduler.set_timesteps(200)
stock.scheduler.set_timesteps(200)
steps = [
    scheduler.step(of_ours, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
    for scheduler in (ours.scheduler, stock.scheduler)
]
difference = float((steps[0] - steps[1]).abs().max())
print(f"one step of either scheduler: difference {difference:.1e}")
assert difference < 1e-4  # Algorithm 2

# %% [markdown]
# <!-- en -->
# ## What would be pushed
#
# `ddpm-hf push MODEL me/NAME` uploads in one commit. With `--dry_run` it lists the files and stops: checkpoints, logs and pictures of training images are not among them.
# <!-- ja -->
# ## アップロードの内容を確認する
#
# `ddpm-hf push MODEL me/NAME` は一つのコミットでアップロードします。`--dry_run` を付けると一覧を表示するだけで終わります。チェックポイント、ログ、学習画像の写った図は
# 含まれません。

# %%
from ddpm_hf.cli import main

main(["push", MODEL, "me/ddpm-digits", "--dry_run"])

# %% [markdown]
# <!-- en -->
# ## The card
#
# The card is written from facts: what the model was trained on, with which options, how it is used.
# <!-- ja -->
# ## モデルカード
#
# モデルカードは事実から自動的に書かれます。何で学習したか、どの設定か、どう使うか。

# %%
import matplotlib.pyplot as plt
from PIL import Image

card = (Path(MODEL) / "README.md").read_text("utf-8")
print("\n".join(card.splitlines()[:14]))
assert "library_name: diffusers" in card
plt.figure(figsize=(4, 4))
plt.imshow(Image.open(Path(MODEL) / "samples.png"))
plt.axis("off")

# %% [markdown] tags=["exercise"]
# <!-- en -->
# Use the model with another scheduler of diffusers, `DDIMScheduler`, in 20 steps.
# <!-- ja -->
# このモデルを diffusers の別のスケジューラ `DDIMScheduler` と組み合わせ、20 ステップで動かしてください。

# %% tags=["solution"]
from diffusers import DDIMScheduler

pipe = DDPMPipelineCustom(ours.unet, DDIMScheduler.from_config(stock.scheduler.config))
pipe.set_progress_bar_config(disable=True)
images = pipe(4, torch.Generator().manual_seed(0), 20, output_type="pt").images
print(tuple(images.shape), type(pipe.scheduler).__name__)
assert images.isfinite().all()

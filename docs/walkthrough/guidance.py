# %% [markdown]
# <!-- en -->
# # 10. Guidance
#
# A network that was told the class of each image can be asked for a class, and for *more* of that class than the data have: classifier-free guidance
# (Ho and Salimans, [arXiv 2207.12598](https://arxiv.org/abs/2207.12598)).
# <!-- ja -->
# # 10. ガイダンス
#
# 各画像のクラスを教えて学習したネットワークには、クラスを指定して生成させることができます。さらに、データ以上に**そのクラスらしく**させることもできます。
# これが分類器なしガイダンス（classifier-free guidance、Ho と Salimans、[arXiv 2207.12598](https://arxiv.org/abs/2207.12598)）です。

# %% [markdown]
# <!-- en -->
# ## The formula, from Bayes' rule
#
# A prediction of noise is a *score*, the gradient of a log density: $\nabla \log q(x_t) = -\epsilon(x_t, t) / \sqrt{1 - \bar\alpha_t}$ for the best $\epsilon$
# ([the unified view](unified.md) proves it). Bayes' rule for a class $y$ says $\log q(y \mid x) = \log q(x \mid y) - \log q(x) + \mathrm{const}$. Sharpen the classifier by a power
# $w$, $q_w(x \mid y) \propto q(x)\, q(y \mid x)^w$, and take the gradient:
#
# $$\nabla \log q_w(x \mid y) = \nabla \log q(x) + w (\nabla \log q(x \mid y) - \nabla \log q(x))$$
#
# In terms of noise, with a *null* label for "any class": $\epsilon_w = \epsilon_\mathrm{null} + w (\epsilon_y - \epsilon_\mathrm{null})$. $w = 1$ is the plain conditional model,
# $w = 0$ the unconditional one. In training some labels are replaced by the null label (`--label_dropout`), so that one network knows both.
# <!-- ja -->
# ## ベイズの定理から式を導く
#
# ノイズの予測は**スコア**、すなわち対数密度の勾配でもあります。最良の $\epsilon$ について $\nabla \log q(x_t) = -\epsilon(x_t, t) / \sqrt{1 - \bar\alpha_t}$ が成り立ちます
# （証明は[統一的な見方](unified.md)にあります）。クラス $y$ についてのベイズの定理は $\log q(y \mid x) = \log q(x \mid y) - \log q(x) + \mathrm{const}$ です。分類器を $w$ 乗で
# 鋭くした $q_w(x \mid y) \propto q(x)\, q(y \mid x)^w$ を考え、勾配を取ると、
#
# $$\nabla \log q_w(x \mid y) = \nabla \log q(x) + w (\nabla \log q(x \mid y) - \nabla \log q(x))$$
#
# ノイズの言葉に直せば、「どのクラスでもよい」を表す**空ラベル**（null）を使って $\epsilon_w = \epsilon_\mathrm{null} + w (\epsilon_y - \epsilon_\mathrm{null})$ です。$w = 1$ は通常の条件付きモデル、
# $w = 0$ は無条件モデルです。学習時に一部のラベルを空ラベルに置き換える（`--label_dropout`）ことで、一つのネットワークが両方を覚えます。

# %%
import matplotlib.pyplot as plt
import torch
from diffusers import UNet2DModel

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom

torch.manual_seed(0)
unet = UNet2DModel(  # untrained: the formula holds for any network
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32),
    layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    num_class_embeds=4,  # three classes, and the null label, which comes last
).eval()  # fmt: skip
pipe = DDPMPipelineCustom(
    unet, DDPMSchedulerCustom(200, beta_schedule="squaredcos_cap_v2", clip_sample=False)
)
pipe.set_progress_bar_config(disable=True)

x, t, w = torch.randn(2, 1, 8, 8), 150, 3.0
with torch.no_grad():
    null = unet(x, t, class_labels=torch.tensor([3, 3])).sample
    conditional = unet(x, t, class_labels=torch.tensor([0, 1])).sample
guided = null + w * (conditional - null)
expected = pipe.scheduler.process.predict_x0(guided, x, t)
options = {"timesteps": [t], "latents": x, "output_type": "latent"}
made = pipe(2, class_labels=[0, 1], guidance_scale=w, **options).images
difference = float((made - expected).abs().max() / expected.abs().max())
print(f"by hand and by the pipeline: relative difference {difference:.1e}")
assert difference < 1e-4  # arXiv 2207.12598, Eq. 6

# %% [markdown]
# <!-- en -->
# ## What it does
#
# A world with two classes on a line, $\mathcal{N}(-1, 0.7^2)$ and $\mathcal{N}(1, 0.7^2)$, where every noise prediction is known. We sample class 2 by DDIM with the guided
# prediction:
# <!-- ja -->
# ## 何が起こるか
#
# 直線上に二つのクラス $\mathcal{N}(-1, 0.7^2)$ と $\mathcal{N}(1, 0.7^2)$ がある世界を考えます。ここでは最良のノイズ予測が厳密に分かります。ガイダンス付きの予測を使い、DDIM でクラス 2 を
# サンプリングしてみましょう。

# %%
process, width = pipe.scheduler.process, 0.7


def noise_of_class(x, t, centre):  # the best prediction, for data N(centre, width²)
    a = process.alpha_bar(t)
    return (1 - a).sqrt() * (x - a.sqrt() * centre) / (a * width**2 + 1 - a)


def noise_of_all(x, t):
    a = process.alpha_bar(t)
    logits = torch.stack(
        [-((x - a.sqrt() * m) ** 2) / (2 * (a * width**2 + 1 - a)) for m in (-1.0, 1.0)]
    )
    share = logits.softmax(0)
    return share[0] * noise_of_class(x, t, -1.0) + share[1] * noise_of_class(x, t, 1.0)


def sample(w):
    x = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in reversed(range(200)):
        eps = noise_of_all(x, t) + w * (noise_of_class(x, t, 1.0) - noise_of_all(x, t))
        c_0, c_t, _ = process.posterior_coefficients(t, t - 1, eta=0.0)
        x = c_0 * process.predict_x0(eps, x, t) + c_t * x
    return x


results = {w: sample(w) for w in (0.0, 1.0, 3.0)}
right = {w: float((x > 0).double().mean()) for w, x in results.items()}
for w, x in results.items():
    options = {"density": True, "histtype": "step", "label": f"w = {w:g}"}
    plt.hist(x.numpy(), bins=80, range=(-4, 4), **options)
    print(f"w = {w:g}: {right[w]:.1%} on the right, std {float(x.std()):.2f}")
plt.gcf().set_size_inches(6, 2.8)
plt.xlabel("x_0")
plt.ylabel("density of samples")
plt.legend()
assert abs(right[0.0] - 0.5) < 0.02
assert abs(float(results[1.0].mean()) - 1) < 0.05
assert right[3.0] > right[1.0]

# %% [markdown] tags=["exercise"]
# <!-- en -->
# Guidance is often said to sample from $q(x)\, q(y \mid x)^w$. Compute the mean of that density for $w = 3$ on a grid, and compare with the samples.
# <!-- ja -->
# ガイダンスは $q(x)\, q(y \mid x)^w$ からのサンプリングだと言われることがあります。$w = 3$ のときのこの密度の平均を格子上で計算し、サンプルの平均と比べてください。

# %% [markdown] tags=["solution"]
# <!-- en -->
# They differ. At each time the guided score is that of $q_w(x_t \mid y)$, but these densities are not noised versions of each other: guidance is a useful heuristic, not a
# sampler of that density.
# <!-- ja -->
# 両者は一致しません。各時刻のスコアは $q_w(x_t \mid y)$ のものですが、これらの密度は「同じ分布にノイズを加えたもの」にはなっていないからです。ガイダンスは有用な
# 経験則であって、この密度からの厳密なサンプリングではありません。

# %% tags=["solution"]
x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
one, two = (torch.exp(-((x - m) ** 2) / (2 * width**2)) for m in (-1.0, 1.0))
density = (one + two) * (two / (one + two)) ** 3
exact = float((x * density).sum() / density.sum())
print(f"mean of the density: {exact:.3f}, of the samples: {float(results[3.0].mean()):.3f}")
assert abs(exact - float(results[3.0].mean())) > 0.02

# %% [markdown]
# <!-- en -->
# # 9. Few steps
#
# A thousand network calls for an image are many. The same network also works in ten, if the formulas are written for steps of any length.
# <!-- ja -->
# # 9. 少ないステップ数
#
# 画像 1 枚のためにネットワークを 1000 回呼ぶのは大変です。しかし、任意の長さのステップについて式を書き直せば、同じネットワークのまま 10 ステップでも動きます。

# %% [markdown]
# <!-- en -->
# ## Any pair of times
#
# [The closed form](closed_form.md) holds from any $s$ to any $t$. With $\beta_{t|s} = 1 - \bar\alpha_t / \bar\alpha_s$ in the place of $\beta_t$, the proof of
# [the posterior](posterior.md) is the same word for word. More is possible. Let
#
# $$q_\sigma(x_s \mid x_t, x_0) = \mathcal{N} \left( \sqrt{\bar\alpha_s}\, x_0 + \sqrt{1 - \bar\alpha_s - \sigma^2}\, \frac{x_t - \sqrt{\bar\alpha_t}\, x_0}{\sqrt{1 - \bar\alpha_t}}, \sigma^2 I \right)$$
#
# for *any* $\sigma^2 \leq 1 - \bar\alpha_s$ (DDIM, [arXiv 2010.02502](https://arxiv.org/abs/2010.02502)). *It leaves $q(x_s \mid x_0)$ as it is:* given $x_0$, the fraction
# is standard normal by (4), so $x_s$ has the mean $\sqrt{\bar\alpha_s}\, x_0$ and the variance $(1 - \bar\alpha_s - \sigma^2) + \sigma^2 = 1 - \bar\alpha_s$. ∎
#
# The network was trained on nothing but these marginals, so it fits every $\sigma$. With $\sigma^2 = \eta^2 \tilde\beta_{t|s}$, $\eta = 1$ is DDPM, and $\eta = 0$ is a
# deterministic map from noise to image. Coefficients are given by [`posterior_coefficients`][P.posterior_coefficients].
# <!-- ja -->
# ## 任意の二時刻
#
# [一度に飛ぶ式](closed_form.md)は、任意の $s$ から任意の $t$ へ成り立ちます。$\beta_t$ の代わりに $\beta_{t|s} = 1 - \bar\alpha_t / \bar\alpha_s$ を使えば、
# [事後分布](posterior.md)の証明も一字一句そのまま通用します。さらに一般に、
#
# $$q_\sigma(x_s \mid x_t, x_0) = \mathcal{N} \left( \sqrt{\bar\alpha_s}\, x_0 + \sqrt{1 - \bar\alpha_s - \sigma^2}\, \frac{x_t - \sqrt{\bar\alpha_t}\, x_0}{\sqrt{1 - \bar\alpha_t}}, \sigma^2 I \right)$$
#
# を**任意の** $\sigma^2 \leq 1 - \bar\alpha_s$ について考えます（DDIM、[arXiv 2010.02502](https://arxiv.org/abs/2010.02502)）。**これは周辺分布 $q(x_s \mid x_0)$ を変えません。**
# $x_0$ を固定すると、式 (4) より分数の部分は標準正規分布に従います。したがって $x_s$ の平均は $\sqrt{\bar\alpha_s}\, x_0$、分散は
# $(1 - \bar\alpha_s - \sigma^2) + \sigma^2 = 1 - \bar\alpha_s$ です。∎
#
# ネットワークが学習で見たのはこの周辺分布だけですから、どの $\sigma$ でも使えます。$\sigma^2 = \eta^2 \tilde\beta_{t|s}$ とおくと、$\eta = 1$ が DDPM、$\eta = 0$ はノイズから画像への
# 決定論的な写像になります。係数は [`posterior_coefficients`][P.posterior_coefficients] が返します。

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from ddpm_hf import DDPMProcess, load_pipeline
from ddpm_hf.diffusion.ddpm_process import make_betas

process = DDPMProcess(make_betas("linear", 1000))
t, s = torch.tensor([999, 500, 100, 20]), torch.tensor([899, 250, 99, 3])
alpha_bar = process.alpha_bar
for eta in (0.0, 0.5, 1.0):
    c_0, c_t, variance = process.posterior_coefficients(t, s, eta)
    mean = c_0 + c_t * alpha_bar(t).sqrt()  # E[x_s | x_0 = 1]
    spread = c_t**2 * (1 - alpha_bar(t)) + variance
    off = float((mean - alpha_bar(s).sqrt()).abs().max())
    spread_off = float((spread - (1 - alpha_bar(s))).abs().max())
    print(f"η = {eta}: mean off by {off:.0e}, variance by {spread_off:.0e}")
    assert off < 1e-12  # DDIM, Eq. 7
    assert spread_off < 1e-12  # DDIM, Eq. 7

# %% [markdown]
# <!-- en -->
# ## The best variance
#
# In long steps neither $\beta$ nor $\tilde\beta$ is right. If $\hat x_0$ misses $x_0$ by $e_t = \mathbb{E} \Vert x_0 - \hat x_0 \Vert^2 / d$, then $x_s$ is uncertain by
# the posterior's variance *and* by what $\hat x_0$ leaves open. These are independent, and $x_0$ enters the mean with the factor $c_0$. A Gaussian fits best if its variance is
# the mean square of the deviations, so the best one has
#
# $$\sigma^{*2} = \tilde\beta_{t|s} + c_0^2\, e_t$$
#
# (Bao et al. 2022, [arXiv 2201.06503](https://arxiv.org/abs/2201.06503), Theorem 1; [`optimal_variance`][P.optimal_variance]). For data $\mathcal{N}(0, c)$ everything is
# known: $e_t = c (1 - \bar\alpha_t) / (c \bar\alpha_t + 1 - \bar\alpha_t)$. Five steps with $\sigma^{*2}$ should then give exactly the variance $c$:
# <!-- ja -->
# ## 最良の分散
#
# ステップが長いと、$\beta$ も $\tilde\beta$ も最適ではありません。$\hat x_0$ の誤差を $e_t = \mathbb{E} \Vert x_0 - \hat x_0 \Vert^2 / d$ とすると、$x_s$ の不確かさは、事後分布の分散**と**、
# $\hat x_0$ が決めきれなかった分の和になります。両者は独立で、$x_0$ は係数 $c_0$ で平均に入ります。ガウス分布の当てはまりが最もよくなるのは、分散が偏差の二乗平均に等しいときですから、最良の分散は
#
# $$\sigma^{*2} = \tilde\beta_{t|s} + c_0^2\, e_t$$
#
# です（Bao ら 2022、[arXiv 2201.06503](https://arxiv.org/abs/2201.06503)、定理 1。[`optimal_variance`][P.optimal_variance]）。データが $\mathcal{N}(0, c)$ なら
# すべて計算でき、$e_t = c (1 - \bar\alpha_t) / (c \bar\alpha_t + 1 - \bar\alpha_t)$ です。$\sigma^{*2}$ を使えば、たった 5 ステップでも分散はちょうど $c$ になるはずです。

# %%
c, grid = 0.25, [999, 749, 499, 249, 0]
results = {}
for choice in ("fixed_small", "fixed_large", "optimal"):
    variance = 1.0
    for t, s in zip(grid, [*grid[1:], -1], strict=True):
        a = float(alpha_bar(t))
        slope, error = c * a**0.5 / (c * a + 1 - a), c * (1 - a) / (c * a + 1 - a)
        c_0, c_t, _ = process.posterior_coefficients(t, s)
        if choice == "optimal":
            added = process.optimal_variance(error, t, s)
        else:
            added = process.p_log_variance(t, s, choice).exp()
        variance = float((c_0 * slope + c_t) ** 2 * variance + added)
    results[choice] = variance
print(f"the data have the variance {c}; the samples:")
for choice, variance in results.items():
    print(f"  {choice:11} {variance:.4f}")
assert abs(results["optimal"] - c) < 1e-4  # arXiv 2201.06503, Theorem 1
assert abs(results["fixed_small"] - c) > 10 * abs(results["optimal"] - c)

# %% [markdown]
# <!-- en -->
# ## In pictures
#
# The model of digits in 5, 10 and 25 steps; a second-order correction (`solver_order=2`) uses how $\hat x_0$ changed since the step before, at no further call.
# <!-- ja -->
# ## 画像で見る
#
# 数字のモデルを 5、10、25 ステップで動かします。2 次の補正（`solver_order=2`）は直前のステップからの $\hat x_0$ の変化を使うもので、ネットワークの呼び出し回数は増えません。

# %%
assert Path("walkthrough-digits").is_dir(), (
    "run the page about training first: it makes this model"
)
pipe = load_pipeline("walkthrough-digits")
pipe.set_progress_bar_config(disable=True)
fig, axes = plt.subplots(2, 3, figsize=(9, 3.2))
for column, steps in enumerate((5, 10, 25)):
    for row, options in enumerate(({}, {"eta": 0.0, "solver_order": 2})):
        random = [torch.Generator().manual_seed(i) for i in range(12)]
        images = pipe(12, random, steps, output_type="pt", **options).images[:, 0]
        tiles = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1)
        axes[row, column].imshow(
            tiles.reshape(2, 6, 10, 10).permute(0, 2, 1, 3).reshape(20, 60), cmap="gray"
        )
        axes[row, column].set_title(
            f"{steps} steps, " + ("second order" if row else "DDPM"), fontsize=9
        )
        axes[row, column].set_axis_off()

# %% [markdown] tags=["exercise"]
# <!-- en -->
# With $\eta = 0$ nothing is random but the start. Check that one seed gives nearly the same image in 50 and in 200 steps, and that with $\eta = 1$ it does not.
# <!-- ja -->
# $\eta = 0$ では、乱数は出発点だけです。同じシードなら 50 ステップでも 200 ステップでもほぼ同じ画像になること、$\eta = 1$ ではそうならないことを確かめてください。

# %% tags=["solution"]
distances = {}
for eta in (0.0, 1.0):
    few, many = (
        pipe(8, torch.Generator().manual_seed(3), k, output_type="pt", eta=eta).images
        for k in (50, 200)
    )
    distances[eta] = float((few - many).square().mean().sqrt())
print(distances)
assert distances[0.0] < 0.5 * distances[1.0]

# %% [markdown]
# <!-- en -->
# # 2. The closed form
#
# A thousand steps to noise one image would make training slow. They are not needed: $x_t$ can be drawn from $x_0$ at once.
# <!-- ja -->
# # 2. 任意の時刻へ一度に飛ぶ
#
# 画像 1 枚にノイズを加えるのに毎回 1000 ステップかけていては、学習が進みません。実はその必要はなく、$x_0$ から $x_t$ を一度に
# サンプリングできます。

# %% [markdown]
# <!-- en -->
# ## The statement
#
# With $\alpha_t = 1 - \beta_t$ and $\bar\alpha_t = \prod_{s=1}^t \alpha_s$,
#
# $$q(x_t \mid x_0) = \mathcal{N}(\sqrt{\bar\alpha_t}\, x_0, (1 - \bar\alpha_t) I), \qquad x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, \quad \epsilon \sim \mathcal{N}(0, I) \qquad (4)$$
#
# ## The proof, by induction
#
# *$t = 1$.* Since $\bar\alpha_1 = \alpha_1$ and $1 - \bar\alpha_1 = \beta_1$, (4) is (2).
#
# *From $t - 1$ to $t$.* Let $x_{t-1} = \sqrt{\bar\alpha_{t-1}}\, x_0 + \sqrt{1 - \bar\alpha_{t-1}}\, \epsilon'$. One more step, with new
# noise $\epsilon''$ that is independent of $\epsilon'$, gives
#
# $$x_t = \sqrt{\alpha_t}\, x_{t-1} + \sqrt{1 - \alpha_t}\, \epsilon'' = \sqrt{\alpha_t \bar\alpha_{t-1}}\, x_0 + \sqrt{\alpha_t (1 - \bar\alpha_{t-1})}\, \epsilon' + \sqrt{1 - \alpha_t}\, \epsilon''$$
#
# The first factor is $\sqrt{\bar\alpha_t}$. A sum of independent Gaussians is Gaussian, and their variances add:
#
# $$\alpha_t (1 - \bar\alpha_{t-1}) + 1 - \alpha_t = 1 - \alpha_t \bar\alpha_{t-1} = 1 - \bar\alpha_t$$
#
# So $x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$ with a standard normal $\epsilon$, which is (4). ∎
#
# Nothing in the proof needs the first step to start at 0: from any $s < t$,
# $q(x_t \mid x_s) = \mathcal{N}(\sqrt{\bar\alpha_t / \bar\alpha_s}\, x_s, (1 - \bar\alpha_t / \bar\alpha_s) I)$. [Few steps](few_steps.md) will use that.
# <!-- ja -->
# ## 主張
#
# $\alpha_t = 1 - \beta_t$、$\bar\alpha_t = \prod_{s=1}^t \alpha_s$ とおくと、
#
# $$q(x_t \mid x_0) = \mathcal{N}(\sqrt{\bar\alpha_t}\, x_0, (1 - \bar\alpha_t) I), \qquad x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, \quad \epsilon \sim \mathcal{N}(0, I) \qquad (4)$$
#
# ## 帰納法による証明
#
# **$t = 1$ のとき。** $\bar\alpha_1 = \alpha_1$、$1 - \bar\alpha_1 = \beta_1$ なので、式 (4) は式 (2) そのものです。
#
# **$t - 1$ から $t$ へ。** $x_{t-1} = \sqrt{\bar\alpha_{t-1}}\, x_0 + \sqrt{1 - \bar\alpha_{t-1}}\, \epsilon'$ と書けたとします。$\epsilon'$ と独立な
# 新しいノイズ $\epsilon''$ を使ってもう 1 ステップ進めると、
#
# $$x_t = \sqrt{\alpha_t}\, x_{t-1} + \sqrt{1 - \alpha_t}\, \epsilon'' = \sqrt{\alpha_t \bar\alpha_{t-1}}\, x_0 + \sqrt{\alpha_t (1 - \bar\alpha_{t-1})}\, \epsilon' + \sqrt{1 - \alpha_t}\, \epsilon''$$
#
# 第 1 項の係数は $\sqrt{\bar\alpha_t}$ です。独立なガウス変数の和はガウス分布に従い、分散は足し算になります（再生性）。
#
# $$\alpha_t (1 - \bar\alpha_{t-1}) + 1 - \alpha_t = 1 - \alpha_t \bar\alpha_{t-1} = 1 - \bar\alpha_t$$
#
# よって標準正規分布に従う $\epsilon$ を用いて $x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$ と書け、式 (4) が示されました。∎
#
# 証明では、出発点が時刻 0 であることを使っていません。任意の $s < t$ について
# $q(x_t \mid x_s) = \mathcal{N}(\sqrt{\bar\alpha_t / \bar\alpha_s}\, x_s, (1 - \bar\alpha_t / \bar\alpha_s) I)$ が成り立ちます。これは[少ないステップ数](few_steps.md)のページで使います。

# %%
import matplotlib.pyplot as plt
import torch

from ddpm_hf import DDPMProcess
from ddpm_hf.diffusion.ddpm_process import make_betas

betas = make_betas("linear", 1000)
process = DDPMProcess(betas)

product = 1.0
for t, beta in enumerate(betas.tolist()):
    product *= 1 - beta
    assert abs(float(process.alpha_bar(t)) - product) < 1e-12  # Eq. 4
print(f"ᾱ_T = {product:.4e}")
assert abs(product - 4.0358e-05) < 1e-9  # Eq. 4

# %% [markdown]
# <!-- en -->
# [`q_sample`][P.q_sample] draws (4), [`q_mean_variance`][P.q_mean_variance] gives its mean and variance. Is the chain of the last
# page distributed like that? We send 20,000 copies of one pixel along it and compare mean and variance, in standard errors:
# <!-- ja -->
# 式 (4) のサンプリングは [`q_sample`][P.q_sample]、平均と分散は [`q_mean_variance`][P.q_mean_variance] で得られます。前のページの連鎖と
# 本当に同じ分布でしょうか。同じ画素を 20,000 個用意して連鎖を進め、平均と分散を標準誤差の単位で比べます。

# %%
draws, pixel = 20_000, 0.8
torch.manual_seed(0)
x = torch.full((draws, 1), pixel, dtype=torch.float64)
times, means, variances = [], [], []
for t in range(1000):
    x = process.q_step(x, t, torch.randn_like(x))
    if t % 100 == 99:
        times.append(t)
        means.append(float(x.mean()))
        variances.append(float(x.var()))

closed = process.q_mean_variance(
    torch.full((10, 1), pixel, dtype=torch.float64), torch.tensor(times)
)
mean, variance = closed.mean.flatten(), closed.variance.flatten()
z_mean = (torch.tensor(means, dtype=torch.float64) - mean) / (variance / draws).sqrt()
z_variance = (torch.tensor(variances, dtype=torch.float64) - variance) / (
    variance * (2 / draws) ** 0.5
)
largest = float(torch.cat([z_mean, z_variance]).abs().max())
print(f"the largest of 20 deviations: {largest:.1f} standard errors")
assert largest < 4  # Eq. 4

t = torch.arange(1000)
plt.figure(figsize=(7, 3))
plt.plot(t, process.alpha_bar(t).sqrt() * pixel, label="mean, Eq. 4")
plt.plot(t, process.one_minus_alpha_bar(t), label="variance, Eq. 4")
plt.plot(times, means, "o", label="mean of the chain")
plt.plot(times, variances, "x", label="variance of the chain")
plt.xlabel("t")
plt.legend()

# %% [markdown]
# <!-- en -->
# ## Signal and noise
#
# What matters for learning is the ratio $\mathrm{SNR}(t) = \bar\alpha_t / (1 - \bar\alpha_t)$, from [`snr`][P.snr]. In half
# precision a careless `1 - ᾱ` is rounded to nothing for small t; here tables are float64 and use `expm1`, so that
# $1 - \bar\alpha_1 = \beta_1$ to the last digit.
# <!-- ja -->
# ## 信号とノイズ
#
# 学習にとって重要なのは信号対雑音比 $\mathrm{SNR}(t) = \bar\alpha_t / (1 - \bar\alpha_t)$ で、[`snr`][P.snr] が返します。半精度で素朴に
# `1 - ᾱ` を計算すると、小さい t では丸められて消えてしまいます。ここでは表を float64 で持ち、`expm1` を使うので、$1 - \bar\alpha_1 = \beta_1$
# が最後の桁まで成り立ちます。

# %%
assert abs(float(process.one_minus_alpha_bar(0)) / 1e-4 - 1) < 1e-12
first, last = process.snr(torch.tensor([0, 999])).tolist()
assert abs(first - (1 - 1e-4) / 1e-4) < 1e-6
assert abs(process.log_snr(999).exp().item() / last - 1) < 1e-12
print(f"SNR: {first:.0f} after one step, {last:.1e} after all of them")

# %% [markdown] tags=["exercise"]
# <!-- en -->
# Draw $x_{300}$ from $x_0$, and $x_{700}$ from $x_{300}$ by the formula for $s < t$. Which mean and variance does $x_{700}$ have,
# given $x_0$? Compare with (4), exactly.
# <!-- ja -->
# $x_0$ から $x_{300}$ を、さらに $s < t$ の公式で $x_{300}$ から $x_{700}$ を得たとします。$x_0$ が与えられたときの $x_{700}$ の平均と分散を
# 求め、式 (4) と厳密に一致することを確かめてください。

# %% tags=["solution"]
s, t = 300, 700
first = process.q_mean_variance(torch.ones(1, 1, dtype=torch.float64), s)
second = process.q_step_mean_variance(first.mean, t, s)
factor = process.alpha_bar(t) / process.alpha_bar(s)
variance = factor * first.variance + second.variance
assert abs(float(second.mean) - float(process.alpha_bar(t).sqrt())) < 1e-12
assert abs(float(variance) - float(process.one_minus_alpha_bar(t))) < 1e-12
print(float(second.mean), float(variance))

# %% [markdown]
# <!-- en -->
# # 4. The loss
#
# What should the network be trained on? On the likelihood of the images, as far as that can be had: a bound on it falls apart
# into one term per step, each a comparison of two Gaussians. In the end it is the mean square of a difference of noises.
# <!-- ja -->
# # 4. 損失関数
#
# ネットワークは何を目標に学習すべきでしょうか。本来の目標は画像の尤度ですが、直接は計算できません。そこで**変分下界**（負の対数尤度の
# 上界）を使います。これはステップごとの項、すなわち二つのガウス分布の比較に分解でき、最終的には「ノイズの差の二乗平均」という驚くほど単純な
# 形になります。

# %% [markdown]
# <!-- en -->
# ## The bound
#
# Write the likelihood as an expectation over paths, $p_\theta(x_0) = \mathbb{E}_{q(x_{1:T} \mid x_0)} [p_\theta(x_{0:T}) / q(x_{1:T} \mid x_0)]$.
# Since $-\log$ is convex, Jensen's inequality gives
#
# $$\mathbb{E}[-\log p_\theta(x_0)] \leq \mathbb{E}_q \left[ -\log \frac{p_\theta(x_{0:T})}{q(x_{1:T} \mid x_0)} \right] = \mathbb{E}_q \left[ -\log p(x_T) - \sum_{t \geq 1} \log \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_t \mid x_{t-1})} \right] = L \qquad (3)$$
#
# ## KL divergence and entropy
#
# How far is a distribution $p$ from $q$? The *KL divergence* $D(q \Vert p) = \mathbb{E}_q [\log q(x) - \log p(x)]$ is 0 where they are equal, and
# positive otherwise: Jensen's inequality again, for $-\log (p / q)$. Between two Gaussians it is
#
# $$D(\mathcal{N}(\mu_1, \sigma_1^2) \Vert \mathcal{N}(\mu_2, \sigma_2^2)) = \frac{1}{2} \left( \frac{\sigma_1^2}{\sigma_2^2} - 1 - \log \frac{\sigma_1^2}{\sigma_2^2} + \frac{(\mu_1 - \mu_2)^2}{\sigma_2^2} \right)$$
#
# since in
#
# $$\log q - \log p = -\frac{1}{2} \log \frac{\sigma_1^2}{\sigma_2^2} - \frac{(x - \mu_1)^2}{2 \sigma_1^2} + \frac{(x - \mu_2)^2}{2 \sigma_2^2}$$
#
# the squares average $\sigma_1^2$ and $\sigma_1^2 + (\mu_1 - \mu_2)^2$ under $q$. The *entropy* $H(x_0) = \mathbb{E} [-\log q(x_0)]$ is what the best of all models reaches: any other costs $D(q \Vert p_\theta)$ more.
#
# ## Appendix A: the bound as a sum of KL divergences
#
# The first two lines are (3), and $t = 1$ is taken out of the sum:
#
# $$L = \mathbb{E}_q \left[ -\log \frac{p_\theta(x_{0:T})}{q(x_{1:T} \mid x_0)} \right] \qquad (17)$$
#
# $$= \mathbb{E}_q \left[ -\log p(x_T) - \sum_{t \geq 1} \log \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_t \mid x_{t-1})} \right] \qquad (18)$$
#
# $$= \mathbb{E}_q \left[ -\log p(x_T) - \sum_{t > 1} \log \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_t \mid x_{t-1})} - \log \frac{p_\theta(x_0 \mid x_1)}{q(x_1 \mid x_0)} \right] \qquad (19)$$
#
# Bayes' rule of [the last page](posterior.md) says
#
# $$q(x_t \mid x_{t-1}) = q(x_{t-1} \mid x_t, x_0)\, q(x_t \mid x_0) / q(x_{t-1} \mid x_0)$$
#
# and with that, the fractions for $t > 1$ become
#
# $$= \mathbb{E}_q \left[ -\log p(x_T) - \sum_{t > 1} \log \left( \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_{t-1} \mid x_t, x_0)} \cdot \frac{q(x_{t-1} \mid x_0)}{q(x_t \mid x_0)} \right) - \log \frac{p_\theta(x_0 \mid x_1)}{q(x_1 \mid x_0)} \right] \qquad (20)$$
#
# The second fractions form a telescope: their product over $t = 2, …, T$ is $q(x_1 \mid x_0) / q(x_T \mid x_0)$. Its numerator
# cancels against the last term, and its denominator joins $p(x_T)$:
#
# $$= \mathbb{E}_q \left[ -\log \frac{p(x_T)}{q(x_T \mid x_0)} - \sum_{t > 1} \log \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_{t-1} \mid x_t, x_0)} - \log p_\theta(x_0 \mid x_1) \right] \qquad (21)$$
#
# Taking the expectation over $x_T$, and over $x_{t-1}$ given $x_t$ and $x_0$, first, each logarithm becomes a KL divergence:
#
# $$= \mathbb{E}_q \left[ \underbrace{D(q(x_T \mid x_0) \Vert p(x_T))}_{L_T} + \sum_{t > 1} \underbrace{D(q(x_{t-1} \mid x_t, x_0) \Vert p_\theta(x_{t-1} \mid x_t))}_{L_{t-1}} \underbrace{- \log p_\theta(x_0 \mid x_1)}_{L_0} \right] \qquad (5), (22)$$
#
# If instead $q(x_t \mid x_{t-1}) = q(x_{t-1} \mid x_t)\, q(x_t) / q(x_{t-1})$ is put into (18), which is (23) again, the telescope
# is one of marginals:
#
# $$L = \mathbb{E}_q \left[ -\log p(x_T) - \sum_{t \geq 1} \log \left( \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_{t-1} \mid x_t)} \cdot \frac{q(x_{t-1})}{q(x_t)} \right) \right] \qquad (23), (24)$$
#
# $$= \mathbb{E}_q \left[ -\log \frac{p(x_T)}{q(x_T)} - \sum_{t \geq 1} \log \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_{t-1} \mid x_t)} - \log q(x_0) \right] \qquad (25)$$
#
# $$= D(q(x_T) \Vert p(x_T)) + \mathbb{E}_q \left[ \sum_{t \geq 1} D(q(x_{t-1} \mid x_t) \Vert p_\theta(x_{t-1} \mid x_t)) \right] + H(x_0) \qquad (16), (26)$$
#
# This second form can't be computed for images, since $q(x_{t-1} \mid x_t)$ is unknown, but it shows what the bound loses: $L$ is
# the entropy of the data if and only if every reverse step is right. ∎
# <!-- ja -->
# ## 変分下界
#
# 尤度を経路についての期待値 $p_\theta(x_0) = \mathbb{E}_{q(x_{1:T} \mid x_0)} [p_\theta(x_{0:T}) / q(x_{1:T} \mid x_0)]$ として書きます。
# $-\log$ は凸関数なので、イェンセンの不等式より
#
# $$\mathbb{E}[-\log p_\theta(x_0)] \leq \mathbb{E}_q \left[ -\log \frac{p_\theta(x_{0:T})}{q(x_{1:T} \mid x_0)} \right] = \mathbb{E}_q \left[ -\log p(x_T) - \sum_{t \geq 1} \log \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_t \mid x_{t-1})} \right] = L \qquad (3)$$
#
# ## KL ダイバージェンスとエントロピー
#
# 分布 $p$ は $q$ からどれだけ離れているでしょうか。それを測るのが **KL ダイバージェンス** $D(q \Vert p) = \mathbb{E}_q [\log q(x) - \log p(x)]$ です。二つの分布が等しければ 0、
# そうでなければ正の値を取ります（$-\log (p / q)$ に再びイェンセンの不等式を使えば分かります）。ガウス分布どうしなら、
#
# $$D(\mathcal{N}(\mu_1, \sigma_1^2) \Vert \mathcal{N}(\mu_2, \sigma_2^2)) = \frac{1}{2} \left( \frac{\sigma_1^2}{\sigma_2^2} - 1 - \log \frac{\sigma_1^2}{\sigma_2^2} + \frac{(\mu_1 - \mu_2)^2}{\sigma_2^2} \right)$$
#
# となります。なぜなら、
#
# $$\log q - \log p = -\frac{1}{2} \log \frac{\sigma_1^2}{\sigma_2^2} - \frac{(x - \mu_1)^2}{2 \sigma_1^2} + \frac{(x - \mu_2)^2}{2 \sigma_2^2}$$
#
# において、二つの 2 乗の $q$ による期待値は $\sigma_1^2$ と $\sigma_1^2 + (\mu_1 - \mu_2)^2$ だからです。**エントロピー** $H(x_0) = \mathbb{E} [-\log q(x_0)]$ は、考えうる最良のモデルが達する値です。ほかのモデルでは $D(q \Vert p_\theta)$ だけ大きくなります。
#
# ## 付録 A：KL ダイバージェンスの和への分解
#
# 最初の 2 行は式 (3) そのもので、3 行目で和から $t = 1$ の項を取り出します。
#
# $$L = \mathbb{E}_q \left[ -\log \frac{p_\theta(x_{0:T})}{q(x_{1:T} \mid x_0)} \right] \qquad (17)$$
#
# $$= \mathbb{E}_q \left[ -\log p(x_T) - \sum_{t \geq 1} \log \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_t \mid x_{t-1})} \right] \qquad (18)$$
#
# $$= \mathbb{E}_q \left[ -\log p(x_T) - \sum_{t > 1} \log \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_t \mid x_{t-1})} - \log \frac{p_\theta(x_0 \mid x_1)}{q(x_1 \mid x_0)} \right] \qquad (19)$$
#
# [前のページ](posterior.md)で使ったベイズの定理
#
# $$q(x_t \mid x_{t-1}) = q(x_{t-1} \mid x_t, x_0)\, q(x_t \mid x_0) / q(x_{t-1} \mid x_0)$$
#
# を $t > 1$ の分数に代入します。
#
# $$= \mathbb{E}_q \left[ -\log p(x_T) - \sum_{t > 1} \log \left( \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_{t-1} \mid x_t, x_0)} \cdot \frac{q(x_{t-1} \mid x_0)}{q(x_t \mid x_0)} \right) - \log \frac{p_\theta(x_0 \mid x_1)}{q(x_1 \mid x_0)} \right] \qquad (20)$$
#
# 二つ目の分数は隣どうしで打ち消し合い、$t = 2, …, T$ についての積は $q(x_1 \mid x_0) / q(x_T \mid x_0)$ になります。分子は最後の項と打ち消し合い、
# 分母は $p(x_T)$ と一緒になります。
#
# $$= \mathbb{E}_q \left[ -\log \frac{p(x_T)}{q(x_T \mid x_0)} - \sum_{t > 1} \log \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_{t-1} \mid x_t, x_0)} - \log p_\theta(x_0 \mid x_1) \right] \qquad (21)$$
#
# 先に $x_T$ について、また $x_t$ と $x_0$ を固定して $x_{t-1}$ について期待値を取れば、各対数は KL ダイバージェンスになります。
#
# $$= \mathbb{E}_q \left[ \underbrace{D(q(x_T \mid x_0) \Vert p(x_T))}_{L_T} + \sum_{t > 1} \underbrace{D(q(x_{t-1} \mid x_t, x_0) \Vert p_\theta(x_{t-1} \mid x_t))}_{L_{t-1}} \underbrace{- \log p_\theta(x_0 \mid x_1)}_{L_0} \right] \qquad (5), (22)$$
#
# 一方、式 (18)（式 (23) はその再掲です）に $q(x_t \mid x_{t-1}) = q(x_{t-1} \mid x_t)\, q(x_t) / q(x_{t-1})$ を代入すると、今度は周辺分布が
# 打ち消し合います。
#
# $$L = \mathbb{E}_q \left[ -\log p(x_T) - \sum_{t \geq 1} \log \left( \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_{t-1} \mid x_t)} \cdot \frac{q(x_{t-1})}{q(x_t)} \right) \right] \qquad (23), (24)$$
#
# $$= \mathbb{E}_q \left[ -\log \frac{p(x_T)}{q(x_T)} - \sum_{t \geq 1} \log \frac{p_\theta(x_{t-1} \mid x_t)}{q(x_{t-1} \mid x_t)} - \log q(x_0) \right] \qquad (25)$$
#
# $$= D(q(x_T) \Vert p(x_T)) + \mathbb{E}_q \left[ \sum_{t \geq 1} D(q(x_{t-1} \mid x_t) \Vert p_\theta(x_{t-1} \mid x_t)) \right] + H(x_0) \qquad (16), (26)$$
#
# $q(x_{t-1} \mid x_t)$ が未知なので、画像に対してこの形を計算することはできません。しかし、この形から下界がどれだけ緩いかが分かります。
# $L$ がデータのエントロピーに等しくなるのは、逆過程の全ステップが正しいとき、そのときに限ります。∎

# %% [markdown]
# <!-- en -->
# ## The numbers
#
# A world where every density is known: $x_0 \sim \mathcal{N}(0, c)$, six steps, and a reverse process that is deliberately a
# bit wrong. Lines (17) to (21) and (23) to (25) are equal *for each path*, not only on average:
# <!-- ja -->
# ## 数値で確かめる
#
# すべての密度が分かる世界で確かめましょう。$x_0 \sim \mathcal{N}(0, c)$、ステップ数は 6、逆過程はわざと少し間違えておきます。式 (17)–(21) と
# (23)–(25) の中身は、期待値を取る前から、**経路ごとに**等しくなります。

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch.distributions import Normal

from ddpm_hf import DDPMProcess
from ddpm_hf.diffusion.ddpm_process import make_betas, normal_kl
from ddpm_hf.training.losses import l_simple, vlb

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
T, c = 6, 0.25
process = DDPMProcess([0.05, 0.1, 0.2, 0.3, 0.5, 0.8])


def q(t, s, x_s):  # q(x_t | x_s), for times as in code: -1 is the data
    step = process.q_step_mean_variance(x_s, t, s)
    return Normal(step.mean, step.variance.sqrt())


def q_posterior(t, x_t, x_0):  # q(x_(t-1) | x_t, x_0)
    posterior = process.q_posterior(x_0, x_t, t)
    return Normal(posterior.mean, posterior.variance.sqrt())


def marginal_variance(t):
    return process.alpha_bar(t) * c + 1 - process.alpha_bar(t)


def q_reverse(t, x_t):  # q(x_(t-1) | x_t), for Gaussian data
    factor = (1 - process.beta(t)).sqrt() * marginal_variance(t - 1) / marginal_variance(t)
    variance = marginal_variance(t - 1) * process.beta(t) / marginal_variance(t)
    return Normal(factor * x_t, variance.sqrt())


def p(t, x_t):  # p_θ(x_(t-1) | x_t): a bit off in mean and variance
    right = q_reverse(t, x_t)
    return Normal(0.9 * right.mean + 0.05, 1.1 * right.stddev)


def q_0(x):
    return Normal(0.0, c**0.5).log_prob(x)


def q_t(t, x):
    return Normal(0.0, marginal_variance(t).sqrt()).log_prob(x)


n = 200_000
x = {-1: torch.randn(n, 1) * c**0.5}
for t in range(T):
    x[t] = process.q_step(x[t - 1], t, torch.randn(n, 1))
start = Normal(0.0, 1.0).log_prob(x[T - 1])
p_step = {t: p(t, x[t]).log_prob(x[t - 1]) for t in range(T)}
q_step = {t: q(t, t - 1, x[t - 1]).log_prob(x[t]) for t in range(T)}
post = {t: q_posterior(t, x[t], x[-1]).log_prob(x[t - 1]) for t in range(1, T)}
from_0 = {t: q(t, -1, x[-1]).log_prob(x[t]) for t in range(T)}
back = {t: q_reverse(t, x[t]).log_prob(x[t - 1]) for t in range(T)}

line_17 = -(start + sum(p_step.values()) - sum(q_step.values()))
line_18 = -start - sum(p_step[t] - q_step[t] for t in range(T))
line_19 = -start - sum(p_step[t] - q_step[t] for t in range(1, T)) - (p_step[0] - q_step[0])
line_20 = (
    -start
    - sum(p_step[t] - post[t] + from_0[t - 1] - from_0[t] for t in range(1, T))
    - (p_step[0] - from_0[0])
)
line_21 = (
    -(start - from_0[T - 1]) - sum(p_step[t] - post[t] for t in range(1, T)) - p_step[0]
)
line_23 = line_18
marginals = {
    t: (q_t(t - 1, x[t - 1]) if t else q_0(x[-1])) - q_t(t, x[t]) for t in range(T)
}
line_24 = -start - sum(p_step[t] - back[t] + marginals[t] for t in range(T))
line_25 = (
    -(start - q_t(T - 1, x[T - 1]))
    - sum(p_step[t] - back[t] for t in range(T))
    - q_0(x[-1])
)
assert (line_17 - line_18).abs().max() < 1e-9  # Eq. 17, Eq. 18
assert (line_19 - line_18).abs().max() < 1e-9  # Eq. 19
assert (line_20 - line_19).abs().max() < 1e-9  # Eq. 20
assert (line_21 - line_20).abs().max() < 1e-9  # Eq. 21
assert (line_24 - line_23).abs().max() < 1e-9  # Eq. 23, Eq. 24
assert (line_25 - line_24).abs().max() < 1e-9  # Eq. 25
print(f"L, averaged over {n:,} paths: {float(line_17.mean()):.5f} nats")

# %% [markdown]
# <!-- en -->
# The expectations of (22) and (26), with the KL divergences in closed form ([`normal_kl`][M.normal_kl]); and the likelihood itself,
# since a chain of Gaussians with linear means has a Gaussian $p_\theta(x_0)$:
# <!-- ja -->
# 次に式 (22) と (26) の期待値です。KL ダイバージェンスは閉じた形で計算します（[`normal_kl`][M.normal_kl]）。平均が線形なガウス分布の連鎖では
# $p_\theta(x_0)$ もガウス分布になるので、尤度そのものも計算できます。

# %%


def kl(a, b):
    return normal_kl(a.mean, 2 * a.stddev.log(), b.mean, 2 * b.stddev.log())


zero, one = torch.zeros(1), torch.ones(1)
line_22 = (
    kl(q(T - 1, -1, x[-1]), Normal(zero, one))
    + sum(kl(q_posterior(t, x[t], x[-1]), p(t, x[t])) for t in range(1, T))
    - p_step[0]
)
entropy = Normal(0.0, c**0.5).entropy()
line_26 = (
    kl(Normal(zero, marginal_variance(T - 1).sqrt()), Normal(zero, one))
    + sum(kl(q_reverse(t, x[t]), p(t, x[t])) for t in range(T))
    + entropy
)
error = float((line_22 - line_17).std() / n**0.5 + (line_26 - line_17).std() / n**0.5)
print(f"(22): {float(line_22.mean()):.5f} nats, ± {error:.5f}")
print(f"(26): {float(line_26.mean()):.5f} nats, ± {error:.5f}")
assert abs(float(line_22.mean() - line_17.mean())) < 4 * error  # Eq. 5, Eq. 22
assert abs(float(line_26.mean() - line_17.mean())) < 4 * error  # Eq. 16, Eq. 26

mean, variance = zero, one
for t in reversed(range(T)):  # the marginal of the reverse chain
    step = p(t, mean)
    slope = p(t, one).mean - p(t, zero).mean
    mean, variance = step.mean, slope**2 * variance + step.variance
cross_entropy = -float(Normal(mean, variance.sqrt()).log_prob(x[-1]).mean())
print(f"-log p(x_0): {cross_entropy:.5f} nats, entropy of the data: {float(entropy):.5f}")
assert float(entropy) < cross_entropy < float(line_17.mean())  # Eq. 3

# %% [markdown]
# <!-- en -->
# ## From KL to noise
#
# Let $\Sigma_\theta = \sigma_t^2 I$ be fixed. The KL divergence of two Gaussians depends on $\theta$ through their means alone:
#
# $$L_{t-1} = \mathbb{E}_q \left[ \frac{1}{2 \sigma_t^2} \Vert \tilde\mu_t(x_t, x_0) - \mu_\theta(x_t, t) \Vert^2 \right] + C \qquad (8)$$
#
# By (4), $x_0 = (x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon) / \sqrt{\bar\alpha_t}$. Put into (7), with $\sqrt{\bar\alpha_{t-1}} / \sqrt{\bar\alpha_t} = 1 / \sqrt{\alpha_t}$,
#
# $$L_{t-1} - C = \mathbb{E}_{x_0, \epsilon} \left[ \frac{1}{2 \sigma_t^2} \left\Vert \tilde\mu_t \left( x_t, \frac{1}{\sqrt{\bar\alpha_t}} (x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon) \right) - \mu_\theta(x_t, t) \right\Vert^2 \right] \qquad (9)$$
#
# The factor of $x_t$ in $\tilde\mu_t$ becomes
#
# $$\frac{\beta_t}{\sqrt{\alpha_t} (1 - \bar\alpha_t)} + \frac{\sqrt{\alpha_t} (1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t} = \frac{\beta_t + \alpha_t - \bar\alpha_t}{\sqrt{\alpha_t} (1 - \bar\alpha_t)} = \frac{1}{\sqrt{\alpha_t}}$$
#
# so that
#
# $$L_{t-1} - C = \mathbb{E}_{x_0, \epsilon} \left[ \frac{1}{2 \sigma_t^2} \left\Vert \frac{1}{\sqrt{\alpha_t}} \left( x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}} \epsilon \right) - \mu_\theta(x_t, t) \right\Vert^2 \right] \qquad (10)$$
#
# The network knows $x_t$; only $\epsilon$ is missing. So let it predict $\epsilon_\theta$, and put that in the same place:
#
# $$\mu_\theta(x_t, t) = \frac{1}{\sqrt{\alpha_t}} \left( x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}} \epsilon_\theta(x_t, t) \right) \qquad (11)$$
#
# The $x_t$ cancel, and the bound is a weighted square of a difference of noises:
#
# $$L_{t-1} - C = \mathbb{E}_{x_0, \epsilon} \left[ \frac{\beta_t^2}{2 \sigma_t^2 \alpha_t (1 - \bar\alpha_t)} \Vert \epsilon - \epsilon_\theta(\sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, t) \Vert^2 \right] \qquad (12)$$
#
# Without the weight it is simpler. It is no bound any more, but it cares less about the first steps, whose details no eye sees. The paper measures
# better samples (Table 2); `ddpm-hf paper MODEL --figures ablation` repeats that in small.
#
# $$L_\mathrm{simple} = \mathbb{E}_{t, x_0, \epsilon} \left[ \Vert \epsilon - \epsilon_\theta(\sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, t) \Vert^2 \right] \qquad (14)$$
# <!-- ja -->
# ## KL からノイズの二乗誤差へ
#
# 分散 $\Sigma_\theta = \sigma_t^2 I$ を固定します。すると二つのガウス分布の KL ダイバージェンスは、平均を通してのみ $\theta$ に依存します。
#
# $$L_{t-1} = \mathbb{E}_q \left[ \frac{1}{2 \sigma_t^2} \Vert \tilde\mu_t(x_t, x_0) - \mu_\theta(x_t, t) \Vert^2 \right] + C \qquad (8)$$
#
# 式 (4) より $x_0 = (x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon) / \sqrt{\bar\alpha_t}$ です。これを式 (7) に代入し、$\sqrt{\bar\alpha_{t-1}} / \sqrt{\bar\alpha_t} = 1 / \sqrt{\alpha_t}$ に注意すると、
#
# $$L_{t-1} - C = \mathbb{E}_{x_0, \epsilon} \left[ \frac{1}{2 \sigma_t^2} \left\Vert \tilde\mu_t \left( x_t, \frac{1}{\sqrt{\bar\alpha_t}} (x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon) \right) - \mu_\theta(x_t, t) \right\Vert^2 \right] \qquad (9)$$
#
# $\tilde\mu_t$ における $x_t$ の係数は
#
# $$\frac{\beta_t}{\sqrt{\alpha_t} (1 - \bar\alpha_t)} + \frac{\sqrt{\alpha_t} (1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t} = \frac{\beta_t + \alpha_t - \bar\alpha_t}{\sqrt{\alpha_t} (1 - \bar\alpha_t)} = \frac{1}{\sqrt{\alpha_t}}$$
#
# となるので、
#
# $$L_{t-1} - C = \mathbb{E}_{x_0, \epsilon} \left[ \frac{1}{2 \sigma_t^2} \left\Vert \frac{1}{\sqrt{\alpha_t}} \left( x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}} \epsilon \right) - \mu_\theta(x_t, t) \right\Vert^2 \right] \qquad (10)$$
#
# ネットワークは $x_t$ を知っています。知らないのは $\epsilon$ だけです。そこで $\epsilon_\theta$ を予測させ、同じ場所に入れます。
#
# $$\mu_\theta(x_t, t) = \frac{1}{\sqrt{\alpha_t}} \left( x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}} \epsilon_\theta(x_t, t) \right) \qquad (11)$$
#
# $x_t$ が打ち消し合い、各項は重み付きのノイズの二乗誤差になります。
#
# $$L_{t-1} - C = \mathbb{E}_{x_0, \epsilon} \left[ \frac{\beta_t^2}{2 \sigma_t^2 \alpha_t (1 - \bar\alpha_t)} \Vert \epsilon - \epsilon_\theta(\sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, t) \Vert^2 \right] \qquad (12)$$
#
# 重みを外すとさらに単純になります。もはや上界ではありませんが、目に見えない細部を受け持つ最初の数ステップにこだわらなくなります。論文では、このほうが良い画像が
# 得られました（表 2）。`ddpm-hf paper MODEL --figures ablation` で小規模に再現できます。
#
# $$L_\mathrm{simple} = \mathbb{E}_{t, x_0, \epsilon} \left[ \Vert \epsilon - \epsilon_\theta(\sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, t) \Vert^2 \right] \qquad (14)$$

# %%
process = DDPMProcess(make_betas("linear", 1000))
x_0 = torch.rand(4, 1, 8, 8) * 2 - 1
noise = torch.randn_like(x_0)
guess = torch.randn_like(x_0)  # stands for what the network says
t = torch.tensor([5, 100, 500, 900])
x_t = process.q_sample(x_0, t, noise)
posterior = process.q_posterior(x_0, x_t, t)
reverse = process.p_mean_variance(guess, x_t, t, variance_type="fixed_large")  # σ² = β


def shaped(v):
    return v.reshape(-1, 1, 1, 1)


alpha, alpha_bar, beta = 1 - process.beta(t), process.alpha_bar(t), process.beta(t)
from_noise = (x_t - shaped(beta / (1 - alpha_bar).sqrt()) * noise) / shaped(alpha.sqrt())
mu_theta = (x_t - shaped(beta / (1 - alpha_bar).sqrt()) * guess) / shaped(alpha.sqrt())
from_x_0 = process.q_posterior(
    (x_t - shaped((1 - alpha_bar).sqrt()) * noise) / shaped(alpha_bar.sqrt()), x_t, t
).mean
assert (posterior.mean - from_x_0).abs().max() < 1e-10  # Eq. 9
assert (posterior.mean - from_noise).abs().max() < 1e-10  # Eq. 10
assert (reverse.mean - mu_theta).abs().max() < 1e-10  # Eq. 11

bound = process.L_t_minus_1(x_0, x_t, t, reverse) * math.log(2)  # nats per dimension
ratio = posterior.variance.flatten() / beta
constant = 0.5 * (ratio - 1 - ratio.log())  # C: what the variances alone cost
means = ((posterior.mean - reverse.mean) ** 2).flatten(1).mean(1) / (2 * beta)
squares = ((noise - guess) ** 2).flatten(1).mean(1)
noises = beta**2 / (2 * beta * alpha * (1 - alpha_bar)) * squares
estimate = vlb(
    process, guess, x_0, x_t, t, "epsilon", "fixed_large"
)  # of (5), at a random t
assert torch.allclose(estimate.double(), 1000 * bound / math.log(2), rtol=1e-5)
print("L_(t-1), nats/dim:", [f"{v:.5f}" for v in bound.tolist()])
assert (bound - means - constant).abs().max() < 1e-10  # Eq. 8
assert (bound - noises - constant).abs().max() < 1e-10  # Eq. 12
assert (l_simple(guess, noise) - squares).abs().max() < 1e-6  # Eq. 14

# %% [markdown] tags=["exercise"]
# <!-- en -->
# How much more does the bound weigh the first step than the last, compared with $L_\mathrm{simple}$? Take $\sigma_t^2 = \beta_t$, and
# draw the weight of (12).
# <!-- ja -->
# $L_\mathrm{simple}$ と比べて、変分下界は最初のステップを最後のステップの何倍重視しているでしょうか。$\sigma_t^2 = \beta_t$ として、
# 式 (12) の重みを描いてください。

# %% tags=["solution"]
t = torch.arange(1000)
beta, alpha_bar = process.beta(t), process.alpha_bar(t)
weight = beta / (2 * (1 - beta) * (1 - alpha_bar))
print(f"{float(weight[0] / weight[-1]):.0f} times")
print(f"and {float(weight[0] / weight.min()):.0f} times the least of all")
assert weight.argmin() > 100
plt.figure(figsize=(6, 2.6))
plt.semilogy(t, weight)
plt.xlabel("t")
plt.title("weight of |ε - ε_θ|² in the bound")

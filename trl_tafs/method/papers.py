"""The papers that the parts of the method come from, as a model card cites them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv."""

    name: str  # of the method, "Flow-GRPO"
    key: str  # BibTeX's
    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str  # its number

    @property
    def url(self) -> str:
        """Where it is."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    def bibtex(self) -> str:
        """Return its entry."""
        return f"""\
@misc{{{self.key},
  title         = {{{self.title}}},
  author        = {{{" and ".join(self.authors)}}},
  year          = {{{self.year}}},
  eprint        = {{{self.arxiv}}},
  archivePrefix = {{arXiv}}
}}"""


def _paper(name: str, key: str, title: str, authors: str, year: int, arxiv: str) -> Paper:
    return Paper(name, key, title, tuple(authors.split(", ")), year, arxiv)


TAFS_GRPO = _paper(
    "TAFS-GRPO",
    "yue2026know",
    "Know Your Step: Faster and Better Alignment for Flow Matching Models via Step-aware Advantages",
    "Zhixiong Yue, Zixuan Ni, Feiyang Ye, Jinshan Zhang, Sheng Shen, Zhenpeng Mi",
    2026,
    "2602.01591",
)
SUPERFLOW = _paper(
    "SuperFlow",
    "chen2025superflow",
    "SuperFlow: Training Flow Matching Models with RL on the Fly",
    "Kaijie Chen, Zhiyang Xu, Ying Shen, Zihao Lin, Yuguang Yao, Lifu Huang",
    2025,
    "2512.17951",
)
DIFFUSION_NFT = _paper(
    "DiffusionNFT",
    "zheng2025diffusionnft",
    "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
    "Kaiwen Zheng, Huayu Chen, Haotian Ye, Haoxiang Wang, Qinsheng Zhang, Kai Jiang, Hang Su, Stefano Ermon, Jun Zhu, "
    "Ming-Yu Liu",
    2025,
    "2509.16117",
)
AWM = _paper(
    "AWM",
    "xue2025awm",
    "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
    "Shuchen Xue, Chongjian Ge, Shilong Zhang, Yichen Li, Zhi-Ming Ma",
    2025,
    "2509.25050",
)
DMD2 = _paper(
    "DMD2",
    "yin2024improved",
    "Improved Distribution Matching Distillation for Fast Image Synthesis",
    "Tianwei Yin, Michaël Gharbi, Taesung Park, Richard Zhang, Eli Shechtman, Fredo Durand, William T. Freeman",
    2024,
    "2405.14867",
)
FLOW_GRPO = _paper(
    "Flow-GRPO",
    "liu2025flowgrpo",
    "Flow-GRPO: Training Flow Matching Models via Online RL",
    "Jie Liu, Gongye Liu, Jiajun Liang, Yangguang Li, Jiaheng Liu, Xintao Wang, Pengfei Wan, Di Zhang, Wanli Ouyang",
    2025,
    "2505.05470",
)
DANCE_GRPO = _paper(
    "DanceGRPO",
    "xue2025dancegrpo",
    "DanceGRPO: Unleashing GRPO on Visual Generation",
    "Zeyue Xue, Jie Wu, Yu Gao, Fangyuan Kong, Lingting Zhu, Mengzhao Chen, Zhiheng Liu, Wei Liu, Qiushan Guo, "
    "Weilin Huang, Ping Luo",
    2025,
    "2505.07818",
)
FLOW_CPS = _paper(
    "Flow-CPS",
    "wang2025coefficients",
    "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching",
    "Feng Wang, Zihao Yu",
    2025,
    "2509.05952",
)
MIX_GRPO = _paper(
    "MixGRPO",
    "li2025mixgrpo",
    "MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE",
    "Junzhe Li, Yutao Cui, Tao Huang, Yinping Ma, Chun Fan, Miles Yang, Zhao Zhong",
    2025,
    "2507.21802",
)

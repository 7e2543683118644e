"""Word lists that the demo's data is made of; knows no task.

English words are single lower-case words, Chinese words are two characters long, and no list holds a word twice.
"""

from __future__ import annotations

__all__ = ["CODE_LETTERS", "EN_NAMES", "EN_NOUNS", "EN_VERBS", "ZH_NAMES", "ZH_NOUNS", "ZH_VERBS"]

_EN_NOUNS = """
apple river stone cloud table window garden bridge candle mirror basket hammer ladder pillow blanket bottle bucket
button
camera carpet castle cherry circle coffee copper corner cotton cradle dragon drawer engine fabric feather fence finger
flower forest fossil fountain galaxy garlic ginger glacier glove grape guitar harbor helmet honey hotel island jacket
jungle kettle kitchen kitten lantern lemon letter library lizard locket magnet mango maple marble market meadow melon
metal monkey moon mountain museum needle notebook oasis ocean olive onion orange orchid oven oyster paddle palace
panda
paper parrot pasta peach pebble pencil pepper piano picnic pigeon planet pocket pond potato puppet puzzle quartz
rabbit
radio rainbow ribbon robot rocket saddle salmon sandal scarf school shadow silver singer spider spoon spring square
statue
storm street sugar summer sunset sweater temple thunder ticket tiger tomato tower train tunnel turtle valley velvet
village violin wagon walnut water whale wheel whistle winter wolf wood yogurt zebra acorn airport almond anchor ankle
arrow autumn badge bakery balcony balloon bamboo banana banner barrel beach beacon beaver bell bench berry bicycle
birch
biscuit board boat bonnet book boot bowl branch brass bread brick broom brush bubble buffalo bus butter cabin cactus
cake
camel canal candy canoe canyon car cart cat cave cedar chain chair chalk cheese chess chicken chimney city clay clock
coast
coat coin comet cookie coral cow crab crane crayon cricket crow crown crystal cup curtain daisy deer desert desk
diamond
dish doctor dog dolphin donkey door dove drum duck eagle earth echo egg elbow elephant emerald falcon farm field fig
fire
fish flag flame flute fog fork fox frog fruit gate gift giraffe glass globe goat gold goose grass hat hawk hazel heart
hen
hill hippo hook horse house ice ink iron ivory ivy jar jewel judge juice kite knee knife knot lake lamp leaf leopard
lily
lime lion lobster lock log lotus map mask milk mint mole mouse mug nest net nut oak oar otter owl ox palm pan park pea
pear
pearl pen pet pie pig pin pine pipe plate plum pony pot prism pump queen quill quilt rain ring road roof root rope
rose ruby
rug ruler sack sail salt sand saw seal seed shark sheep shell ship shirt shoe shop silk sink skirt sky sled snail
snake snow
soap sock sofa soup spade squid star stool stove sun swan sword tea tent thread tie toast tooth torch toy tree truck
trunk
tuba tulip turkey vase vest vine wall wasp watch wave wax web well wheat wind wing wire wrist yacht yard
"""

_EN_NAMES = """
alice bob carol david emma frank grace henry iris jack karen leo maria nina oscar paul rosa sam tina victor wendy yuki
adam bella carlos diana eric fiona george hannah ivan julia kevin laura martin nora oliver peter rachel simon thomas
vera
"""

_EN_VERBS = """
watches follows finds passes paints carries touches visits guards crosses repairs remembers describes forgets moves
"""

_ZH_NOUNS = """
苹果 河流 石头 云朵 桌子 窗户 花园 大桥 蜡烛 镜子 篮子 锤子 梯子 枕头 毯子 瓶子 水桶 按钮 相机 地毯 城堡 樱桃 圆圈
咖啡 铜器 角落
棉花 摇篮 飞龙 抽屉 引擎 布料 羽毛 栅栏 手指 鲜花 森林 化石 喷泉 银河 大蒜 生姜 冰川 手套 葡萄 吉他 港口 头盔 蜂蜜
酒店 岛屿 夹克
丛林 水壶 厨房 小猫 灯笼 柠檬 信件 书馆 蜥蜴 项链 磁铁 芒果 枫树 弹珠 市场 草地 甜瓜 金属 猴子 月亮 高山 展馆 针线
笔记 绿洲 海洋
橄榄 洋葱 橙子 兰花 烤箱 牡蛎 船桨 宫殿 熊猫 白纸 鹦鹉 面条 桃子 鹅卵 铅笔 胡椒 钢琴 野餐 鸽子 行星 口袋 池塘 土豆
木偶 拼图 水晶
兔子 电台 彩虹 丝带 机器 火箭 马鞍 鲑鱼 凉鞋 围巾 学校 影子 白银 歌手 蜘蛛 勺子 春天 广场 雕像 风暴 街道 白糖 夏天
日落 毛衣 寺庙
雷电 车票 老虎 番茄 高塔 火车 隧道 乌龟 山谷 天鹅 村庄 提琴 马车 核桃 清水 鲸鱼 车轮 口哨 冬天 野狼 木材 酸奶 斑马
橡果 机场 杏仁
船锚 弓箭 秋天 徽章 面包 阳台 气球 竹子 香蕉 横幅 木桶 沙滩 灯塔 海狸 铃铛 长椅 草莓 单车 白桦 饼干 木板 小船 书本
靴子 饭碗 树枝
黄铜 砖头 扫帚 刷子 泡泡 水牛 汽车 黄油 小屋 仙人 蛋糕 骆驼 运河 糖果 峡谷 山洞 雪松 锁链 椅子 粉笔 奶酪 象棋 小鸡
烟囱 城市 泥土
时钟 海岸 大衣 硬币 彗星 珊瑚 奶牛 螃蟹 白鹤 蜡笔 蟋蟀 乌鸦 皇冠 杯子 窗帘 雏菊 小鹿 沙漠 书桌 钻石 盘子 医生 小狗
海豚 毛驴 大门
白鸽 大鼓 鸭子 老鹰 地球 回声 鸡蛋 大象 翡翠 猎鹰 农场 田野 火焰 旗帜 长笛 浓雾 叉子 狐狸 青蛙 水果 礼物 玻璃 山羊
黄金 帽子 红心
山丘 河马 骏马 房屋 冰块 墨水 钢铁 象牙 果汁 风筝 小刀 绳结 湖泊 台灯 树叶 豹子 百合 狮子 龙虾 门锁 荷花 地图 面具
牛奶 薄荷 老鼠
"""

_ZH_NAMES = """
小明 小红 小刚 小丽 小华 小芳 小强 小燕 小军 小梅 阿杰 阿强 阿珍 阿文 老王 老李 老张 老赵 老陈 老刘 大卫 安娜 玛丽
汤姆 露西 杰克
"""

_ZH_VERBS = """
看着 跟着 找到 经过 画了 搬走 碰到 参观 守着 穿过 修好 记得 描述 忘记 移动
"""

EN_NOUNS: tuple[str, ...] = tuple(dict.fromkeys(_EN_NOUNS.split()))
EN_NAMES: tuple[str, ...] = tuple(dict.fromkeys(_EN_NAMES.split()))
EN_VERBS: tuple[str, ...] = tuple(dict.fromkeys(_EN_VERBS.split()))
ZH_NOUNS: tuple[str, ...] = tuple(dict.fromkeys(_ZH_NOUNS.split()))
ZH_NAMES: tuple[str, ...] = tuple(dict.fromkeys(_ZH_NAMES.split()))
ZH_VERBS: tuple[str, ...] = tuple(dict.fromkeys(_ZH_VERBS.split()))

CODE_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

"""The dependency graph: names followed through scopes, bases and imports in each language, and nothing linked by its bare name."""

import random
import re

import pytest

from ai_sleep_constructs.memory.code.graph import DependencyGraph
from ai_sleep_constructs.memory.code.languages import language_of
from ai_sleep_constructs.memory.code.parsing import Parsed, extract
from ai_sleep_constructs.memory.code.resolution import bases


def parsed(files: dict[str, str]) -> list[Parsed]:
    found = []
    for path, text in files.items():
        language = language_of(path, text.encode())
        assert language is not None
        found.append(extract(text.encode(), language, path))
    return found


def edges(graph: DependencyGraph) -> set[tuple[str, str]]:
    return set(graph.to_networkx().edges)


# Each repository has a name in a file that no one imports (decoy) which must not be linked; edges as "from -> to".
REPOSITORIES = {
    "python": ({
        "app/__init__.py": "from .impl import helper as public\n",
        "app/impl.py": "def helper(): return inner()\ndef inner(): pass\nclass Base:\n    def shared(self): pass\n    @classmethod\n    def make(cls): return cls()\n",
        "app/sub/__init__.py": "",
        "app/sub/work.py": "from ..impl import Base, inner as renamed\nfrom .. import public\nfrom . import peer\nimport app.impl\nimport json\n"
        "def load(): pass\n"
        "class Job(Base):\n"
        "    def run(self):\n"
        "        def local(): load()\n"
        "        local(); self.shared(); renamed(); public(); peer.go(); app.impl.helper(); json.load(); unknown.load()\n"
        "    def load(self): load(); super().shared(); Job.make()\n",
        "app/sub/peer.py": "def go(): pass\n",
        "json.py": "def decoy(): pass\n",
        "decoy.py": "def run(): pass\ndef load(): pass\ndef renamed(): pass\n",
    }, """
        app/impl.py::helper -> app/impl.py::inner
        app/sub/work.py::Job -> app/impl.py::Base
        app/sub/work.py::Job.run -> app/sub/work.py::Job.run.local
        app/sub/work.py::Job.run.local -> app/sub/work.py::load
        app/sub/work.py::Job.run -> app/impl.py::Base.shared
        app/sub/work.py::Job.run -> app/impl.py::inner
        app/sub/work.py::Job.run -> app/impl.py::helper
        app/sub/work.py::Job.run -> app/sub/peer.py::go
        app/sub/work.py::Job.load -> app/sub/work.py::load
        app/sub/work.py::Job.load -> app/impl.py::Base.shared
        app/sub/work.py::Job.load -> app/impl.py::Base.make"""),
    "javascript": ({
        "src/money.ts": "export function tax(x: number) { return round(x); }\nfunction round(x: number) { return x; }\nexport default class Money { add() {} }\n",
        "src/index.js": "export { tax as vat } from './money';\nexport * from './lib/cart.js';\n",
        "src/lib/cart.ts": "import Cash, * as all from '../money';\nimport { vat } from '..';\n"
        "export class Cart extends Cash { total() { this.add(); this.items(); all.tax(1); vat(2); return new Cash(); } items() {} }\n",
        "src/main.tsx": "import { Cart } from './index';\nconst run = () => new Cart();\nconst other = () => tax(1);\n",
        "src/old.cjs": "const { tax } = require('./money');\nfunction f() { tax(1); round(2); }\n",
        "src/decoy.js": "function tax() {}\nfunction items() {}\n",
    }, """
        src/money.ts::tax -> src/money.ts::round
        src/lib/cart.ts::Cart -> src/money.ts::Money
        src/lib/cart.ts::Cart.total -> src/money.ts::Money.add
        src/lib/cart.ts::Cart.total -> src/lib/cart.ts::Cart.items
        src/lib/cart.ts::Cart.total -> src/money.ts::tax
        src/lib/cart.ts::Cart.total -> src/money.ts::Money
        src/main.tsx::run -> src/lib/cart.ts::Cart
        src/old.cjs::f -> src/money.ts::tax"""),
    "go": ({
        "shop/cart.go": 'package shop\nimport "example.com/x/money"\ntype Cart struct{}\nfunc (c *Cart) Total() int { c.check(); return money.Sum(helper()) }\n',
        "shop/other.go": "package shop\nfunc helper() int { return 1 }\nfunc (c Cart) check() {}\n",
        "money/sum.go": "package money\nfunc Sum(x int) int { return x }\n",
        "decoy/decoy.go": "package shop\nfunc helper() {}\nfunc Sum() {}\n",
    }, """
        shop/cart.go::shop.Cart.Total -> shop/other.go::shop.Cart.check
        shop/cart.go::shop.Cart.Total -> money/sum.go::money.Sum
        shop/cart.go::shop.Cart.Total -> shop/other.go::shop.helper"""),
    "rust": ({
        "src/main.rs": "mod money;\nmod shop;\nuse shop::cart::Cart;\nfn main() { Cart::open(); money::sum(1); helper(); }\nfn helper() {}\n",
        "src/money.rs": "pub fn sum(x: u8) -> u8 { self::inner(x) }\nfn inner(x: u8) -> u8 { x }\n",
        "src/shop/mod.rs": "pub mod cart;\npub fn near() {}\n",
        "src/shop/cart.rs": "use crate::money::{self, sum as add};\npub struct Cart;\nimpl Cart {\n pub fn open() { Self::make(); add(1); money::sum(2); super::near(); }\n fn make() {}\n fn run(&self) { self.go(); }\n fn go(&self) {}\n}\n",
        "src/decoy.rs": "fn sum() {}\nfn helper() {}\nfn near() {}\n",
    }, """
        src/main.rs::main -> src/shop/cart.rs::Cart.open
        src/main.rs::main -> src/money.rs::sum
        src/main.rs::main -> src/main.rs::helper
        src/money.rs::sum -> src/money.rs::inner
        src/shop/cart.rs::Cart.open -> src/shop/cart.rs::Cart.make
        src/shop/cart.rs::Cart.open -> src/money.rs::sum
        src/shop/cart.rs::Cart.open -> src/shop/mod.rs::near
        src/shop/cart.rs::Cart.run -> src/shop/cart.rs::Cart.go"""),
    "java": ({
        "a/Cart.java": "package com.shop;\nimport com.money.Tax;\nimport static com.money.Tax.rate;\nclass Cart extends Base {\n int total() { check(); this.own(); rate(); Peer.help(); return Tax.of(1); }\n void own() { super.check(); new Peer(); }\n}\n",
        "a/Base.java": "package com.shop;\nclass Base { void check() {} }\n",
        "a/Peer.java": "package com.shop;\nclass Peer { static void help() {} }\n",
        "b/Tax.java": "package com.money;\npublic class Tax { static int of(int x) { return x; } static int rate() { return 1; } }\n",
        "c/Decoy.java": "package com.decoy;\nclass Peer { static void help() {} void check() {} }\n",
    }, """
        a/Cart.java::com.shop.Cart -> a/Base.java::com.shop.Base
        a/Cart.java::com.shop.Cart.total -> a/Base.java::com.shop.Base.check
        a/Cart.java::com.shop.Cart.total -> a/Cart.java::com.shop.Cart.own
        a/Cart.java::com.shop.Cart.total -> b/Tax.java::com.money.Tax.rate
        a/Cart.java::com.shop.Cart.total -> b/Tax.java::com.money.Tax.of
        a/Cart.java::com.shop.Cart.total -> a/Peer.java::com.shop.Peer.help
        a/Cart.java::com.shop.Cart.own -> a/Base.java::com.shop.Base.check
        a/Cart.java::com.shop.Cart.own -> a/Peer.java::com.shop.Peer"""),
    "csharp": ({
        "Cart.cs": "using Shop.Money;\nusing T = Shop.Money.Tax;\nnamespace Shop.Core {\nclass Cart : Base {\n int Total() { Check(); this.Own(); T.Of(1); return Tax.Of(1); }\n void Own() { base.Check(); new Peer(); }\n}\n}\n",
        "Base.cs": "namespace Shop.Core;\nclass Base { protected void Check() {} }\nclass Peer {}\n",
        "Tax.cs": "namespace Shop.Money;\nclass Tax { static int Of(int x) => x; }\n",
        "Decoy.cs": "namespace Decoy;\nclass Peer { void Check() {} }\n",
    }, """
        Cart.cs::Shop.Core.Cart -> Base.cs::Shop.Core.Base
        Cart.cs::Shop.Core.Cart.Total -> Base.cs::Shop.Core.Base.Check
        Cart.cs::Shop.Core.Cart.Total -> Cart.cs::Shop.Core.Cart.Own
        Cart.cs::Shop.Core.Cart.Total -> Tax.cs::Shop.Money.Tax.Of
        Cart.cs::Shop.Core.Cart.Own -> Base.cs::Shop.Core.Base.Check
        Cart.cs::Shop.Core.Cart.Own -> Base.cs::Shop.Core.Peer"""),
    "cpp": ({
        "include/cart.hpp": "namespace shop {\nclass Base { void near() {} };\nclass Cart : public Base { int total(); void own() { near(); } };\n}\n",
        "src/cart.cpp": '#include "cart.hpp"\n#include "money.h"\nint shop::Cart::total() { this->own(); own(); sum(1); return local(); }\nstatic int local() { return 1; }\n',
        "src/money.h": "int sum(int x);\n",
        "src/money.c": '#include "money.h"\nint sum(int x) { return x; }\n',
        "src/decoy.cpp": "int sum(int x) { return 0; }\nint local() { return 0; }\nint near() { return 0; }\n",
    }, """
        include/cart.hpp::shop.Cart -> include/cart.hpp::shop.Base
        include/cart.hpp::shop.Cart.own -> include/cart.hpp::shop.Base.near
        src/cart.cpp::shop.Cart.total -> include/cart.hpp::shop.Cart.own
        src/cart.cpp::shop.Cart.total -> src/money.c::sum
        src/cart.cpp::shop.Cart.total -> src/cart.cpp::local"""),
    "ruby": ({
        "lib/cart.rb": "require_relative 'money'\nmodule Shop\n class Cart < Base\n  def total; own(); self.own(); check(1); round(1); Tax.of(1); Line.new(1); end\n  def own; end\n end\nend\n",
        "lib/money.rb": "def round(x) = x\n",
        "lib/base.rb": "module Shop\n class Base\n  def check(x); end\n end\n class Tax\n  def self.of(x); end\n end\nend\nclass Line; end\n",
        "lib/decoy.rb": "def check(x); end\nmodule Other\n class Tax; end\nend\n",
    }, """
        lib/cart.rb::Shop.Cart -> lib/base.rb::Shop.Base
        lib/cart.rb::Shop.Cart.total -> lib/cart.rb::Shop.Cart.own
        lib/cart.rb::Shop.Cart.total -> lib/base.rb::Shop.Base.check
        lib/cart.rb::Shop.Cart.total -> lib/money.rb::round
        lib/cart.rb::Shop.Cart.total -> lib/base.rb::Shop.Tax.of
        lib/cart.rb::Shop.Cart.total -> lib/base.rb::Line"""),
    "php": ({
        "src/Cart.php": "<?php\nnamespace App;\nuse Lib\\{Tax as T};\nuse function Lib\\round;\nrequire __DIR__ . '/helpers.php';\nclass Cart extends Base {\n function total() { $this->own(); self::own(); parent::check(); T::of(1); round(1); new Peer(); help(); }\n function own() { $this->check(); }\n}\n",
        "src/Base.php": "<?php\nnamespace App;\nclass Base { function check() {} }\nclass Peer {}\n",
        "src/helpers.php": "<?php\nfunction help() {}\n",
        "lib/Tax.php": "<?php\nnamespace Lib;\nclass Tax { static function of($x) {} }\nfunction round($x) {}\n",
        "decoy.php": "<?php\nnamespace Decoy;\nfunction help() {}\nclass Peer { function own() {} }\n",
    }, """
        src/Cart.php::App.Cart -> src/Base.php::App.Base
        src/Cart.php::App.Cart.total -> src/Cart.php::App.Cart.own
        src/Cart.php::App.Cart.total -> src/Base.php::App.Base.check
        src/Cart.php::App.Cart.total -> lib/Tax.php::Lib.Tax.of
        src/Cart.php::App.Cart.total -> lib/Tax.php::Lib.round
        src/Cart.php::App.Cart.total -> src/Base.php::App.Peer
        src/Cart.php::App.Cart.total -> src/helpers.php::help
        src/Cart.php::App.Cart.own -> src/Base.php::App.Base.check"""),
}


@pytest.mark.parametrize("language", REPOSITORIES)
def test_links_of_a_repository(language: str) -> None:
    files, expected = REPOSITORIES[language]
    wanted = {tuple(line.strip().split(" -> ")) for line in expected.strip().splitlines()}
    assert edges(DependencyGraph(parsed(files))) == wanted


@pytest.mark.parametrize("language", REPOSITORIES)
def test_file_by_file_gives_the_same_graph(language: str) -> None:
    files, _ = REPOSITORIES[language]
    whole = parsed(files)
    expected = edges(DependencyGraph(whole))
    choose = random.Random(0)
    graph = DependencyGraph()
    for part in choose.sample(whole, len(whole)):
        graph.replace(part)
        edges(graph)
    assert edges(graph) == expected
    for part in whole:
        assert graph.remove(part.path) and not graph.remove(part.path)
        without = DependencyGraph(other for other in whole if other is not part)
        assert edges(graph) == edges(without) and len(graph) == len(without)
        graph.replace(part)
    assert edges(graph) == expected


def test_an_edited_body_is_followed_and_old_names_go() -> None:
    files = {"a.py": "from b import g\ndef f(): g()\n", "b.py": "def g(): h()\ndef h(): pass\ndef k(): pass\n"}
    graph = DependencyGraph(parsed(files))
    assert edges(graph) == {("a.py::f", "b.py::g"), ("b.py::g", "b.py::h")}
    files["b.py"] = files["b.py"].replace("g(): h()", "g(): k()")
    graph.replace(parsed(files)[1])
    assert edges(graph) == {("a.py::f", "b.py::g"), ("b.py::g", "b.py::k")} and graph.entity("b.py::g").body == "def g(): k()"
    files["b.py"] = files["b.py"].replace("def g", "def renamed")
    graph.replace(parsed(files)[1])
    assert edges(graph) == {("b.py::renamed", "b.py::k")} and "b.py::g" not in graph and len(graph) == 4


def test_circles_end() -> None:
    files = {"a.py": "from b import *\nclass A(B): pass\nclass C(C): pass\ndef f(): x(); A().y()\n",
             "b.py": "from a import *\nfrom a import x\nclass B(A):\n    def m(self): self.nothing(); super().m()\n"}
    assert edges(DependencyGraph(parsed(files))) == {("a.py::A", "b.py::B"), ("b.py::B", "a.py::A"), ("a.py::f", "a.py::A")}


def test_many_files_with_the_same_names_have_no_links_between_them() -> None:
    text = "def load(): return parse()\ndef parse(): return save()\n"
    graph = DependencyGraph(extract(text.encode(), "python", f"m{index}.py") for index in range(50))
    assert edges(graph) == {(f"m{index}.py::load", f"m{index}.py::parse") for index in range(50)}


@pytest.mark.parametrize("language, text, expected", [
    ("python", "class A(B[int, str], c.D, metaclass=M): pass", ["B", "c.D"]),
    ("python", "class A(make(B)): pass", []),
    ("typescript", "class A<T extends X> extends B<T> implements C, D<Y> {}", ["B", "C", "D"]),
    ("java", "interface A extends B, C {}", ["B", "C"]),
    ("csharp", "class A<T> : B<T>, N.C where T : new() {}", ["B", "N.C"]),
    ("cpp", "struct A : public ns::B, virtual private C<int> {};", ["ns.B", "C"]),
    ("ruby", "class A < B::C\nend", ["B.C"]),
    ("php", "<?php class A extends \\N\\B implements C {}", ["N.B", "C"]),
    ("go", "package a\ntype A struct { B }", []),
])
def test_bases(language: str, text: str, expected: list[str]) -> None:
    assert bases(extract(text.encode(), language).entities[0]) == expected


def test_callers_callees_figure_and_errors() -> None:
    graph = DependencyGraph(parsed(REPOSITORIES["python"][0]))
    inner = "app/impl.py::inner"
    assert set(graph.callers(inner)) == {"app/impl.py::helper", "app/sub/work.py::Job.run"} and graph.callees(inner) == []
    drawing = graph.figure(inner, steps=1)
    assert set(drawing.data[1].text) == {"inner", "helper", "run"} and re.match(r"\d+ links between 3 entities around inner", drawing.layout.title.text)
    assert len(graph.figure(limit=4).data[1].x) == 4 and len(DependencyGraph().figure().data[1].x) == 0
    node = graph.to_networkx().nodes["app/sub/work.py::Job.run"]
    assert (node["name"], node["kind"], node["line"]) == ("Job.run", "method", 8)
    for ask in (graph.callers, graph.callees, graph.entity, graph.figure):
        with pytest.raises(KeyError, match="id: 'inner' is not in the graph"):
            ask("inner")
    with pytest.raises(TypeError, match="parsed: expected a Parsed, got str"):
        graph.replace("a.py")  # type: ignore[arg-type]

"""Entities, imports and calls of source files: golden answers in every language, and files that are broken or strange."""

import sys

import pytest

from ai_sleep_constructs.memory.code import languages
from ai_sleep_constructs.memory.code.imports import Import, imports_of
from ai_sleep_constructs.memory.code.languages import LANGUAGES, grammar, language_of
from ai_sleep_constructs.memory.code.parsing import Parsed, extract

# For each language: a source, what is found in it as "kind qualified.name lines < parent | signature | documentation | calls",
# and the imports as "name = module : member".
GOLDEN: dict[str, tuple[str, str, str]] = {}

GOLDEN["python"] = (
    r'''import os.path as osp
from .money import Price, tax as vat


# The shop's rate.
RATE = 0.2  # not documentation
def plain(): return osp.join("a", "b")


# Rounds to cents.
@cached
@app.route("/cents")
def cents(value: float) -> int:
    return round(value * 100)


class Cart(Base[int], metaclass=Meta):
    """Lines of a cart.

    Empty at first.
    """

    def total(self, *, rate: float = RATE) -> Price:
        'The sum.'
        def line(item):
            return item.price
        return vat(self.sum(line)) + super().total()

    @property
    async def size(self) -> int:
        r"""Number of lines."""
        return len(self.lines)

    class Line[T]:
        price: T
''',
    r'''
function plain 7-7 <  | def plain() |  | osp.join
function cents 11-14 <  | def cents(value: float) -> int | Rounds to cents. | app.route round
class Cart 17-35 <  | class Cart(Base[int], metaclass=Meta) | Lines of a cart.\n\nEmpty at first. |
method Cart.total 23-27 < Cart | def total(self, *, rate: float = RATE) -> Price | The sum. | self.sum super super.total vat
function Cart.total.line 25-26 < Cart.total | def line(item) |  |
method Cart.size 29-32 < Cart | async def size(self) -> int | Number of lines. | len
class Cart.Line 34-35 < Cart | class Line[T] |  |
''',
    r'''
osp = os.path :
Price = .money : Price
vat = .money : tax
''',
)

GOLDEN["javascript"] = (
    r'''import money, { tax as vat } from "./money";
const { round } = require("./round");

/** Adds a line. */
export default async function add(cart, line) {
  function check(line) { return line.ok; }
  return cart.push(check(line));
}

// The sum of all lines.
export const total = (cart) => vat(cart.lines.reduce((a, b) => a + b, 0));

class Cart extends Base {
  /** The number of lines. */
  get size() { return this.count(); }
  static #make = () => new Cart();
  async *lines() { yield* this.items; }
}

const api = {
  // Loads it.
  load(id) { return fetch(id); },
  save: async function (cart) { return money.round(cart); },
};

Cart.prototype.clear = function () { api.load(1); };
module.exports.helper = (x) => round(x);
const first = 1, second = () => 2;
items.map((x) => x + 1);
''',
    r'''
function add 5-8 <  | export default async function add(cart, line) | Adds a line. | cart.push check
function add.check 6-6 < add | function check(line) |  |
function total 11-11 <  | export const total = (cart) => | The sum of all lines. | cart.lines.reduce vat
class Cart 13-18 <  | class Cart extends Base |  |
method Cart.size 15-15 < Cart | get size() | The number of lines. | this.count
method Cart.#make 16-16 < Cart | static #make = () => |  | Cart
method Cart.lines 17-17 < Cart | async *lines() |  |
function api.load 22-22 <  | load(id) | Loads it. | fetch
function api.save 23-23 <  | save: async function (cart) |  | money.round
method Cart.clear 26-26 < Cart | Cart.prototype.clear = function () |  | api.load
function helper 27-27 <  | module.exports.helper = (x) => |  | round
function second 28-28 <  | const first = 1, second = () => |  |
''',
    r'''
vat = ./money : tax
money = ./money : default
round = ./round : round
''',
)

GOLDEN["typescript"] = (
    r'''import type { Price } from "./price";
import * as money from "./money";

/** A thing with a price. */
export interface Priced<T extends Price> {
  price: T;
  /** With tax. */
  gross(rate: number): T;
}

export enum State { Open, Paid }

namespace shop {
  /* The cart. */
  @Injectable()
  export abstract class Cart<T> implements Priced<T> {
    constructor(private lines: T[]) { super(); }
    @log()
    public total(rate: number = 0): number { return money.sum(this.gross(rate)); }
    abstract pay(): void;
    private check = async <U>(x: U): Promise<boolean> => isOk(x);
  }
  export function open<T>(id: string): Cart<T> { return new Cart<T>([]); }
}
export const sum = <T,>(items: T[]): number => items.length;
''',
    r'''
interface Priced 5-9 <  | export interface Priced<T extends Price> | A thing with a price. |
method Priced.gross 8-8 < Priced | gross(rate: number): T | With tax. |
enum State 11-11 <  | export enum State |  |
class shop.Cart 15-22 <  | @Injectable() export abstract class Cart<T> implements Priced<T> | The cart. | Injectable
method shop.Cart.constructor 17-17 < shop.Cart | constructor(private lines: T[]) |  |
method shop.Cart.total 18-19 < shop.Cart | public total(rate: number = 0): number |  | log money.sum this.gross
method shop.Cart.pay 20-20 < shop.Cart | abstract pay(): void |  |
method shop.Cart.check 21-21 < shop.Cart | private check = async <U>(x: U): Promise<boolean> => |  | isOk
function shop.open 23-23 <  | export function open<T>(id: string): Cart<T> |  | Cart
function sum 25-25 <  | export const sum = <T,>(items: T[]): number => |  |
''',
    r'''
Price = ./price : Price
money = ./money :
''',
)

GOLDEN["tsx"] = (
    r'''import React, { useState } from "react";

type Props = { title: string };

/** A button that counts. */
export const Counter: React.FC<Props> = ({ title }) => {
  const [n, set] = useState(0);
  const click = () => set(n + 1);
  return <button onClick={click}>{title}{n}</button>;
};

export default class Page extends React.Component<Props> {
  render() { return <Counter title={this.title()} />; }
}
''',
    r'''
function Counter 6-10 <  | export const Counter: React.FC<Props> = ({ title }) => | A button that counts. | useState
function Counter.click 8-8 < Counter | const click = () => |  | set
class Page 12-14 <  | export default class Page extends React.Component<Props> |  |
method Page.render 13-13 < Page | render() |  | this.title
''',
    r'''
useState = react : useState
React = react : default
''',
)

GOLDEN["go"] = (
    r'''package shop

import (
	"fmt"
	m "example.com/shop/money"
)

// Cart holds lines.
// It is not safe for concurrent use.
type Cart[T any] struct {
	lines []T
}

type (
	// Priced has a price.
	Priced interface {
		Price() int
	}
	alias = int
)

// Total sums the lines.
func (c *Cart[T]) Total(rate float64) (int, error) {
	add := func(x int) int { return x }
	return m.Sum(c.lines), fmt.Errorf("x")
}

func (Cart[T]) size() int { return 0 }

func New[T any]() *Cart[T] { return &Cart[T]{} }
''',
    r'''
struct shop.Cart 10-12 <  | type Cart[T any] struct | Cart holds lines.\nIt is not safe for concurrent use. |
interface shop.Priced 16-18 <  | Priced interface | Priced has a price. |
method shop.Cart.Total 23-26 < shop.Cart | func (c *Cart[T]) Total(rate float64) (int, error) | Total sums the lines. | fmt.Errorf m.Sum
method shop.Cart.size 28-28 < shop.Cart | func (Cart[T]) size() int |  |
function shop.New 30-30 <  | func New[T any]() *Cart[T] |  |
''',
    r'''
fmt = fmt :
m = example.com/shop/money :
''',
)

GOLDEN["rust"] = (
    r'''use crate::money::{self, Price};
mod tests;

/// A cart.
#[derive(Debug, Clone)]
pub struct Cart<T> { lines: Vec<T> }

pub enum State { Open, Paid }

/// Has a price.
pub trait Priced {
    fn price(&self) -> u64;
    /// Doubled.
    fn double(&self) -> u64 { self.price() * 2 }
}

impl<T: Priced> Cart<T> {
    // Sums up.
    #[inline]
    pub fn total(&self) -> u64 {
        fn inner(x: u64) -> u64 { x }
        Self::check(); inner(money::sum::<u64>(&self.lines))
    }
    fn check() {}
}

impl<T> Priced for Cart<T> { fn price(&self) -> u64 { 1 } }

mod nested { pub fn helper() { super::open(); } }
pub async fn open() -> Cart<u8> { Cart { lines: vec![] } }
''',
    r'''
struct Cart 5-6 <  | pub struct Cart<T> | A cart. |
enum State 8-8 <  | pub enum State |  |
interface Priced 11-15 <  | pub trait Priced | Has a price. |
method Priced.price 12-12 < Priced | fn price(&self) -> u64 |  |
method Priced.double 14-14 < Priced | fn double(&self) -> u64 | Doubled. | self.price
method Cart.total 19-23 < Cart | pub fn total(&self) -> u64 | Sums up. | Self.check inner money.sum
function Cart.total.inner 21-21 < Cart.total | fn inner(x: u64) -> u64 |  |
method Cart.check 24-24 < Cart | fn check() |  |
method Cart.price 27-27 < Cart | fn price(&self) -> u64 |  |
function nested.helper 29-29 <  | pub fn helper() |  | super.open
function open 30-30 <  | pub async fn open() -> Cart<u8> |  | Cart
''',
    r'''
money = crate : money
Price = crate.money : Price
tests = self : tests
''',
)

GOLDEN["java"] = (
    r'''package com.shop;

import com.shop.money.Price;
import static com.shop.money.Tax.*;

/**
 * A cart of lines.
 *
 * @param <T> the line
 */
@Service
public abstract class Cart<T extends Priced> extends Base implements Closeable {
    private int n;
    public Cart(int n) { this.n = n; }
    // The sum.
    @Override
    public Price total(double rate) throws IOException { Runnable r = () -> check(); return new Price(this.sum(rate)); }
    abstract void pay();
    static class Line { int price() { return Tax.of(1); } }
    enum State { OPEN { int code() { return 1; } }; int code() { return 0; } }
}

interface Priced { int price(); default int twice() { return price() * 2; } }
record Point(int x, int y) { Point { check(x); } }
''',
    r'''
class com.shop.Cart 11-21 <  | @Service public abstract class Cart<T extends Priced> extends Base implements Closeable | A cart of lines.\n\n@param <T> the line |
method com.shop.Cart.Cart 14-14 < com.shop.Cart | public Cart(int n) |  |
method com.shop.Cart.total 16-17 < com.shop.Cart | @Override public Price total(double rate) throws IOException | The sum. | Price check this.sum
method com.shop.Cart.pay 18-18 < com.shop.Cart | abstract void pay() |  |
class com.shop.Cart.Line 19-19 < com.shop.Cart | static class Line |  |
method com.shop.Cart.Line.price 19-19 < com.shop.Cart.Line | int price() |  | Tax.of
enum com.shop.Cart.State 20-20 < com.shop.Cart | enum State |  |
method com.shop.Cart.State.code 20-20 < com.shop.Cart.State | int code() |  |
method com.shop.Cart.State.code 20-20 < com.shop.Cart.State | int code() |  |
interface com.shop.Priced 23-23 <  | interface Priced |  |
method com.shop.Priced.price 23-23 < com.shop.Priced | int price() |  |
method com.shop.Priced.twice 23-23 < com.shop.Priced | default int twice() |  | price
class com.shop.Point 24-24 <  | record Point(int x, int y) |  |
method com.shop.Point.Point 24-24 < com.shop.Point | Point |  | check
''',
    r'''
Price = com.shop.money : Price
* = com.shop.money.Tax : *
''',
)

GOLDEN["c"] = (
    r'''#include "money.h"
#include <stdio.h>

/* A line of a cart. */
struct line { int price; };

/* A cart. */
typedef struct cart {
    struct line *lines;
} cart_t;

typedef struct { int x, y; } point;
enum state { OPEN, PAID };
typedef enum { RED } color;

int total(const cart_t *cart);

// The sum.
// In cents.
static inline int
total(const cart_t *cart)
{
    return money_sum(cart->lines) + cart->extra(1);
}

char **names(int (*f)(int)) { return 0; }
''',
    r'''
struct line 5-5 <  | struct line | A line of a cart. |
struct cart 8-10 <  | typedef struct cart | A cart. |
struct point 12-12 <  | typedef struct point |  |
enum state 13-13 <  | enum state |  |
enum color 14-14 <  | typedef enum color |  |
function total 20-24 <  | static inline int total(const cart_t *cart) | The sum.\nIn cents. | cart.extra money_sum
function names 26-26 <  | char **names(int (*f)(int)) |  |
''',
    r'''
* = money.h : *
* = stdio.h : *
''',
)

GOLDEN["cpp"] = (
    r'''#include "cart.h"

namespace shop {
/// A cart.
template <typename T>
class Cart : public Base<T> {
public:
    Cart() : n(0) {}
    virtual ~Cart() { clear(); }
    // The sum.
    int total() const { return this->sum(n) + money::round(1.0); }
    bool operator==(const Cart &other) const { return true; }
    void declared();
    struct Line { int price; };
private:
    int n;
};
enum class State { Open, Paid };
namespace detail::deep { int helper(int x) { return x; } }
}

// Out of class.
template <typename T>
void shop::Cart<T>::declared() { auto f = [](int x) { return x; }; new Line(); detail::deep::helper(1); }

template <>
int convert<int>(double x) { return std::max<int>(1, x); }
''',
    r'''
class shop.Cart 5-17 <  | template <typename T> class Cart : public Base<T> | A cart. |
method shop.Cart.Cart 8-8 < shop.Cart | Cart() : n(0) |  |
method shop.Cart.~Cart 9-9 < shop.Cart | virtual ~Cart() |  | clear
method shop.Cart.total 11-11 < shop.Cart | int total() const | The sum. | money.round this.sum
method shop.Cart.operator== 12-12 < shop.Cart | bool operator==(const Cart &other) const |  |
struct shop.Cart.Line 14-14 < shop.Cart | struct Line |  |
enum shop.State 18-18 <  | enum class State |  |
function shop.detail.deep.helper 19-19 <  | int helper(int x) |  |
method shop.Cart.declared 23-24 < shop.Cart | template <typename T> void shop::Cart<T>::declared() | Out of class. | Line detail.deep.helper
function convert 26-27 <  | template <> int convert<int>(double x) |  | std.max
''',
    r'''
* = cart.h : *
''',
)

GOLDEN["csharp"] = (
    r'''using System;
using Money = Shop.Money;

namespace Shop.Core
{
    /// <summary>
    /// A cart.
    /// </summary>
    [Serializable]
    public class Cart<T> : Base, IPriced where T : new()
    {
        public Cart(int n) { }
        ~Cart() { }
        // The sum.
        public async Task<int> Total(double rate) { int Inner(int x) => x; return this.Sum(Inner(1)) + Money.Round<int>(rate); }
        public int Size => 1;
        public static Cart<T> operator +(Cart<T> a, Cart<T> b) { return new Cart<T>(1); }
        struct Line { public int Price; }
    }
    public interface IPriced { int Price(); }
    enum State { Open, Paid }
    record Point(int X, int Y);
}
''',
    r'''
class Shop.Core.Cart 9-19 <  | [Serializable] public class Cart<T> : Base, IPriced where T : new() | A cart. |
method Shop.Core.Cart.Cart 12-12 < Shop.Core.Cart | public Cart(int n) |  |
method Shop.Core.Cart.~Cart 13-13 < Shop.Core.Cart | ~Cart() |  |
method Shop.Core.Cart.Total 15-15 < Shop.Core.Cart | public async Task<int> Total(double rate) | The sum. | Inner Money.Round this.Sum
function Shop.Core.Cart.Total.Inner 15-15 < Shop.Core.Cart.Total | int Inner(int x) |  |
method Shop.Core.Cart.operator+ 17-17 < Shop.Core.Cart | public static Cart<T> operator +(Cart<T> a, Cart<T> b) |  | Cart
struct Shop.Core.Cart.Line 18-18 < Shop.Core.Cart | struct Line |  |
interface Shop.Core.IPriced 20-20 <  | public interface IPriced |  |
method Shop.Core.IPriced.Price 20-20 < Shop.Core.IPriced | int Price() |  |
enum Shop.Core.State 21-21 <  | enum State |  |
class Shop.Core.Point 22-22 <  | record Point(int X, int Y) |  |
''',
    r'''
* = System : *
Money = Shop : Money
''',
)

GOLDEN["ruby"] = (
    r'''require "json"
require_relative "money/tax"

# A shop.
module Shop
  # A cart of lines.
  #
  # Empty at first.
  class Cart < Base
    include Priced
    attr_reader :lines

    def initialize(lines = []) = @lines = lines

    # The sum.
    def total(rate: 0.2, &block)
      Money::Tax.add(self.sum(rate)).round(2)
    end

    def self.open(id) ; new(id) ; end

    class << self
      def build!; Cart.new; end
    end

    def empty?
    end
  end
  class Money::Line; end
end
''',
    r'''
class Shop 5-30 <  | module Shop | A shop. |
class Shop.Cart 9-28 < Shop | class Cart < Base | A cart of lines.\n\nEmpty at first. | attr_reader include
method Shop.Cart.initialize 13-13 < Shop.Cart | def initialize(lines = []) |  |
method Shop.Cart.total 16-18 < Shop.Cart | def total(rate: 0.2, &block) | The sum. | Money.Tax.add self.sum
method Shop.Cart.open 20-20 < Shop.Cart | def self.open(id) |  | new
method Shop.Cart.build! 23-23 < Shop.Cart | def build! |  | Cart.new
method Shop.Cart.empty? 26-27 < Shop.Cart | def empty? |  |
class Shop.Money.Line 29-29 < Shop.Money | class Money::Line |  |
''',
    r'''
* = json : *
* = ./money/tax : *
''',
)

GOLDEN["php"] = (
    r'''<html><?php
namespace App\Shop;

use App\Money\{Price, Tax as T};
require_once __DIR__ . '/helpers.php';

/**
 * A cart.
 */
#[Entity]
final class Cart extends Base implements Priced
{
    use Counts;
    public function __construct(private int $n = 0) {}
    // The sum.
    public static function total(float $rate): int { $f = fn($x) => $x; return self::sum($rate) + T::of(1); }
    abstract protected function pay(): void;
    private function lines() { return $this->load(new Price(1)); }
}
trait Counts { public function count(): int { return \strlen("a"); } }
interface Priced { public function price(): int; }
enum State: string { case Open = 'o'; public function label(): string { return helper($this); } }
/* Helps. */
function helper($x) { return $x; }
''',
    r'''
class App.Shop.Cart 10-19 <  | #[Entity] final class Cart extends Base implements Priced | A cart. |
method App.Shop.Cart.__construct 14-14 < App.Shop.Cart | public function __construct(private int $n = 0) |  |
method App.Shop.Cart.total 16-16 < App.Shop.Cart | public static function total(float $rate): int | The sum. | T.of self.sum
method App.Shop.Cart.pay 17-17 < App.Shop.Cart | abstract protected function pay(): void |  |
method App.Shop.Cart.lines 18-18 < App.Shop.Cart | private function lines() |  | Price this.load
interface App.Shop.Counts 20-20 <  | trait Counts |  |
method App.Shop.Counts.count 20-20 < App.Shop.Counts | public function count(): int |  | strlen
interface App.Shop.Priced 21-21 <  | interface Priced |  |
method App.Shop.Priced.price 21-21 < App.Shop.Priced | public function price(): int |  |
enum App.Shop.State 22-22 <  | enum State: string |  |
method App.Shop.State.label 22-22 < App.Shop.State | public function label(): string |  | helper
function App.Shop.helper 24-24 <  | function helper($x) | Helps. |
''',
    r'''
Price = App.Money : Price
T = App.Money : Tax
* = ./helpers.php : *
''',
)


def rows(parsed: Parsed) -> list[str]:
    found = []
    for index, entity in enumerate(parsed.entities):
        calls = " ".join(sorted(call.name for call in parsed.calls if call.caller == index))
        where = f"{entity.start_line}-{entity.end_line} < {entity.parent or ''}"
        docstring = entity.docstring.replace("\n", "\\n")
        found.append(f"{entity.kind} {entity.qualified_name} {where} | {entity.signature} | {docstring} | {calls}".rstrip())
    return found


def check_text(source: bytes, parsed: Parsed) -> None:
    """Bytes, lines and text of each entity agree, each is inside its file, and none is there twice."""
    for entity in parsed.entities:
        assert source[entity.start_byte : entity.end_byte].decode("utf-8", "replace") == entity.body and entity.body
        assert source.count(b"\n", 0, entity.start_byte) + 1 == entity.start_line
        assert source.count(b"\n", 0, entity.end_byte) + 1 == entity.end_line
        assert entity.qualified_name.endswith(entity.name) and entity.name
        assert entity.kind in ("function", "method", "class", "interface", "struct", "enum")
    spans = [(entity.start_byte, entity.end_byte, entity.qualified_name) for entity in parsed.entities]
    assert len(set(spans)) == len(spans)


@pytest.mark.parametrize("language", LANGUAGES)
def test_golden(language: str) -> None:
    source, entities, imports = GOLDEN[language]
    parsed = extract(source.encode(), language, "folder/file")
    assert rows(parsed) == entities.strip().splitlines()
    assert [f"{found.name} = {found.module} : {found.member}".rstrip() for found in parsed.imports] == imports.strip().splitlines()
    assert parsed.errors == () and {entity.path for entity in parsed.entities} == {"folder/file"}
    check_text(source.encode(), parsed)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_broken_file_gives_what_can_be_parsed(language: str) -> None:
    source = GOLDEN[language][0].encode()
    whole = {entity.qualified_name for entity in extract(source, language).entities}
    for end in range(0, len(source), 37):
        cut = source[:end]
        parsed = extract(cut, language)
        check_text(cut, parsed)
    kept = extract(source + b"\n\n}}} ) (\n", language)
    assert kept.errors and len(whole & {entity.qualified_name for entity in kept.entities}) >= 0.8 * len(whole)


@pytest.mark.parametrize("language", LANGUAGES)
def test_other_line_ends_and_other_letters(language: str) -> None:
    source = GOLDEN[language][0]
    expected = [entity.qualified_name for entity in extract(source.encode(), language).entities]
    for changed in (source.replace("\n", "\r\n").encode(), source.replace("sum", "süm€").encode(), b"\xef\xbb\xbf" + source.encode()):
        parsed = extract(changed, language)
        check_text(changed, parsed)
        assert len(parsed.entities) == len(expected)
    check_text(b"\xff\xfe\x00" * 40, extract(b"\xff\xfe\x00" * 40, language))
    assert extract(b"", language).entities == ()


def test_deep_nesting_ends() -> None:
    depth = 300
    source = "".join(" " * level + f"def f{level}():\n" for level in range(depth)) + " " * depth + "pass\n"
    parsed = extract(source.encode(), "python")
    assert len(parsed.entities) == depth and parsed.entities[-1].qualified_name.count(".") == depth - 1
    extract(b"(" * 20_000, "python")


@pytest.mark.parametrize("source, docstring", [
    ("# About f.\ndef f(): pass\n", "About f."),
    ("# Far away.\n\ndef f(): pass\n", ""),
    ("x = 1  # about x\ndef f(): pass\n", ""),
    ("# ----\n# About f.\n# ----\ndef f(): pass\n", "About f."),
    ("def f():  # beside\n    'Inside.'\n", "Inside."),
    ("def f():\n    # first\n    return 'no'\n", ""),
    ("def f():\n    f'''No {1}.'''\n", ""),
    ('class A:\n    def f():\n        """One.\n\n          indented\n        """\n', "One.\n\n  indented"),
])
def test_documentation_of_python(source: str, docstring: str) -> None:
    entity = extract(source.encode(), "python").entities[-1]
    assert entity.docstring == docstring and "#" not in entity.signature


def test_same_name_twice_in_a_file_is_two_entities_with_one_id() -> None:
    parsed = extract(b"if a:\n    def f(): x()\nelse:\n    def f(): y()\n", "python", "a.py")
    assert [entity.id for entity in parsed.entities] == ["a.py::f", "a.py::f"] and parsed.entities[0] != parsed.entities[1]
    assert [(call.caller, call.name) for call in parsed.calls] == [(0, "x"), (1, "y")]


@pytest.mark.parametrize("language, text, expected", [
    ("python", "import a.b, c as d", [("a.b", "a.b", ""), ("d", "c", "")]),
    ("python", "from .. import (a, # one\n b as c)", [("a", "..", "a"), ("c", "..", "b")]),
    ("python", "from a import *", [("*", "a", "*")]),
    ("javascript", "import './side-effect'", []),
    ("javascript", "export { a as b } from './x'", [("b", "./x", "a")]),
    ("javascript", "export * from './x'", [("*", "./x", "*")]),
    ("javascript", "money = require('./x')", [("money", "./x", "")]),
    ("typescript", "import { type A, b } from './x'", [("A", "./x", "A"), ("b", "./x", "b")]),
    ("go", '. "a/b"', [("*", "a/b", "*")]),
    ("rust", "pub use a::{b::{C, D as E}, f::*, self};", [("C", "a.b", "C"), ("E", "a.b", "D"), ("*", "a.f", "*"), ("a", "", "a")]),
    ("java", "import a.b.*;", [("*", "a.b", "*")]),
    ("csharp", "using static A.B;", [("*", "A.B", "*")]),
    ("php", "use function A\\f as g;", [("g", "A", "f")]),
    ("php", "require 'a.php'", [("*", "a.php", "*")]),
    ("c", "#include <a/b.h>", [("*", "a/b.h", "*")]),
    ("ruby", 'require_relative "../a"', [("*", "./../a", "*")]),
    ("python", "import", []),
])
def test_imports(language: str, text: str, expected: list[tuple[str, str, str]]) -> None:
    assert imports_of(text, language) == [Import(*found) for found in expected]


def test_imports_come_in_the_order_of_the_file() -> None:
    names = [f"m{number}" for number in range(500)]
    source = "".join(f"import {name}\n" for name in names)
    assert [found.name for found in extract(source.encode(), "python").imports] == names


def test_what_is_found_cannot_be_changed() -> None:
    parsed = extract(b"def f(): g()\n", "python", "a.py")
    for found, name in ((parsed.entities[0], "name"), (parsed.calls[0], "name"), (parsed, "path")):
        with pytest.raises(AttributeError):
            setattr(found, name, "other")
    assert repr(parsed.calls[0]) == "Call(caller=0, name='g')" and len({*parsed.entities, *extract(b"def f(): g()\n", "python", "a.py").entities}) == 1


def test_language_of_a_file() -> None:
    assert [language_of(name) for name in ("a.PY", "a.tsx", "a.mjs", "a.h", "a.hpp", "a.cs", "a", "a.txt")] == [
        "python", "tsx", "javascript", "c", "cpp", "csharp", None, None]
    assert language_of("a.h", b"class A;\n") == "cpp" and language_of("a.h", b"struct a;\n") == "c"
    assert languages.language("C++").name == "cpp"


def test_errors_say_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="source: expected bytes, got str"):
        extract("def f(): pass", "python")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="language: 'cobol' is not one of python, "):
        extract(b"", "cobol")
    grammar.cache_clear()
    monkeypatch.setitem(sys.modules, "tree_sitter_c_sharp", None)
    with pytest.raises(ImportError, match="reading csharp needs .* pip install tree-sitter-c-sharp"):
        extract(b"", "csharp")
    grammar.cache_clear()

// The curve, and BatchNorm with the curve after it, for a CPU. The page `kernels.curve` tells what each section is for.

// == lanes
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#ifdef __AVX__
#include <immintrin.h>
#endif
#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline)) // of a lambda

using I = int64_t;
constexpr I W = 8; // lanes
template<class T> struct lanes { typedef T type __attribute__((vector_size(W*sizeof(T)))); };
template<class T> using V = typename lanes<T>::type;
template<class T> using Mask = decltype(V<T>{} > V<T>{});

struct bfloat16 { uint16_t bits; };
template<class S> struct computed { using type = S; };
template<> struct computed<bfloat16> { using type = float; };
template<class S> using C = typename computed<S>::type; // S is stored, C<S> is computed with

INLINE V<float> widen(V<uint16_t> h) {
  V<uint32_t> w = __builtin_convertvector(h, V<uint32_t>) << 16;
  V<float> v; memcpy(&v, &w, sizeof v); return v;
}
INLINE V<uint16_t> narrow(V<float> v) { // to the nearest, ties to even
  V<uint32_t> w; memcpy(&w, &v, sizeof w);
  w = v == v ? (w + 0x7fff + ((w >> 16) & 1)) >> 16 : V<uint32_t>{} + 0x7fc0;
  return __builtin_convertvector(w, V<uint16_t>);
}
template<class S> INLINE V<C<S>> load(const S* p, I n) {
  V<S> v{};
  if (n == W) memcpy(&v, p, sizeof v); else for (I i = 0; i < n; i++) v[i] = p[i];
  return v;
}
template<class S> INLINE void store(S* p, V<C<S>> v, I n) {
  if (n == W) memcpy(p, &v, sizeof v); else for (I i = 0; i < n; i++) p[i] = v[i];
}
template<> INLINE V<float> load(const bfloat16* p, I n) { return widen(load((const uint16_t*)p, n)); }
template<> INLINE void store(bfloat16* p, V<float> v, I n) { store((uint16_t*)p, narrow(v), n); }
template<class S> INLINE void store_exact(S* p, V<C<S>> v, I n) { store(p, v, n); } // of what needs no rounding
template<> INLINE void store_exact(bfloat16* p, V<float> v, I n) {
  V<uint32_t> w; memcpy(&w, &v, sizeof w);
  store((uint16_t*)p, __builtin_convertvector(w >> 16, V<uint16_t>), n);
}
template<class S> INLINE V<C<S>> rounded(V<C<S>> v) { return v; }
template<> INLINE V<float> rounded<bfloat16>(V<float> v) { return widen(narrow(v)); }

template<class T> INLINE V<T> all(T v) { return V<T>{} + v; }
template<class T> INLINE T total(V<T> v) { T s = 0; for (I i = 0; i < W; i++) s += v[i]; return s; }
template<class T> INLINE uint8_t pack(Mask<T> m) {
#ifdef __AVX__
  if constexpr (sizeof(T) == 4) { __m256 f; memcpy(&f, &m, sizeof f); return _mm256_movemask_ps(f); }
#endif
  unsigned b = 0;
  for (I i = 0; i < W; i++) b |= unsigned(m[i] & 1) << i;
  return b;
}
template<class T> INLINE Mask<T> unpack(uint8_t b) { return (Mask<T>{1, 2, 4, 8, 16, 32, 64, 128} & b) != 0; }

// == curve
template<class T> struct Curve {
  V<T> leak, sub, maxv, floor;
  Curve(V<T> leak, V<T> sub, V<T> maxv) : leak(leak), sub(maxv == maxv ? sub : maxv), maxv(maxv) { // NaN is not hidden
    using limits = std::numeric_limits<T>;
    floor = leak == 0 ? all(limits::lowest()) : all(-limits::infinity()); // 0 * -inf is to be 0
  }
  V<T> negative(V<T> x) const { return x < floor ? floor : x; }
  V<T> shifted(V<T> x) const { return (x > 0 ? x : leak*negative(x)) - sub; }
  V<T> capped(V<T> z) const { return z >= maxv ? maxv : z; }
};
template<class T> struct Sums {
  V<T> leak{}, sub{}, maxv{};
  INLINE void add(const Sums& o) { leak += o.leak; sub += o.sub; maxv += o.maxv; }
};

template<class T> INLINE V<T> from_input(const Curve<T>& c, V<T> x, V<T> z, V<T> g, Sums<T>& s) {
  V<T> none{}, passed = z >= c.maxv ? none : g;
  s.leak += x > 0 ? none : passed*c.negative(x);
  s.sub -= passed;
  s.maxv += z >= c.maxv ? g : none;
  return x > 0 ? passed : passed*c.leak;
}
template<class T> INLINE V<T> from_output(const Curve<T>& c, V<T> y, Mask<T> positive, V<T> g, Sums<T>& s) {
  V<T> none{}, passed = y >= c.maxv ? none : g;
  s.leak += positive ? none : passed*(y + c.sub); // divided by leak at the end
  s.sub -= passed;
  s.maxv += y >= c.maxv ? g : none;
  return positive ? passed : passed*c.leak;
}

// == call
struct Call { // what a kernel is handed; its names, their order and types are read from here by build.py
  void *x, *y, *g, *dx, *signs, *kept, *slot;
  void *leak, *sub, *maxv, *dleak, *dsub, *dmaxv;
  void *weight, *bias, *mean, *var, *dweight, *dbias;
  int64_t numel, channels, inner, repeat, width, training;
  double eps;
};
INLINE I least(I a, I b) { return a < b ? a : b; }
INLINE I most(I a, I b) { return a > b ? a : b; }
template<class T> struct Buffer { // memory that goes with its owner; false where there is none left
  T* at;
  explicit Buffer(I n) : at((T*)malloc(most(n, 1)*sizeof(T))) {}
  ~Buffer() { free(at); }
  Buffer(const Buffer&) = delete;
  explicit operator bool() const { return at; }
};

// == traversal
constexpr I TILE = 4, WIDE = 2048; // rows of columns done together; channels of one task
[[maybe_unused]] constexpr I GRAIN = 32768; // elements below which one thread does it all

template<bool ROWS> struct Shape { // where everything lies, known at compile time to be rows or columns
  I numel, channels, inner, outer, bytes, width, repeat;
  explicit Shape(const Call& a)
      : numel(a.numel), channels(a.channels), inner(ROWS ? a.inner : 1), width(a.width), repeat(a.repeat) {
    outer = (numel + channels*inner - 1)/(channels*inner);
    bytes = ((ROWS ? inner : channels) + W - 1)/W; // of signs, for a row of either kind
  }
};
template<bool ROWS> struct Strip { // `count` groups of `k` lanes, `step` elements apart, which share their channels
  const Shape<ROWS>& of;
  I o, ch, in, count, k; // place of the first group: outer row, channel, element of the row
  INLINE I at() const { return (o*of.channels + ch)*of.inner + in; }
  INLINE I step() const { return ROWS ? W : of.channels; }
  INLINE I signs() const { return ROWS ? (o*of.channels + ch)*of.bytes + in/W : o*of.bytes + ch/W; }
  INLINE I signs_step() const { return ROWS ? 1 : of.bytes; }
  INLINE I kept(I place) const { return ROWS ? (o*of.width + place)*of.inner + in : o*of.width + place; }
  INLINE I kept_step() const { return ROWS ? W : of.width; }
  template<class T> INLINE V<T> value(const T* p) const { return ROWS ? all(p[ch]) : load(p + ch, k); }
};
template<class F> INLINE void along(const Shape<true>& d, I o, I ch, F f) { // a row: whole groups, then what is left
  I n = least(d.inner, d.numel - (o*d.channels + ch)*d.inner), full = n/W;
  f(Strip<true>{d, o, ch, 0, full, W});
  if (I k = n%W) f(Strip<true>{d, o, ch, full*W, 1, k});
}
template<class F> INLINE void across(const Shape<false>& d, I o, I end, I left, I right, F f) { // a tile of columns
  I rows = least(TILE, end - o), ch = left;
  for (; ch + W <= right; ch += W) f(Strip<false>{d, o, ch, 0, rows, W});
  if (ch < right) f(Strip<false>{d, o, ch, 0, rows, right - ch});
}
// f(strip) for strips that make up everything
template<bool ROWS, class F> INLINE void strips(const Shape<ROWS>& d, F f) {
  if constexpr (ROWS) {
    #pragma omp parallel for if (d.numel > GRAIN)
    for (I r = 0; r < (d.numel + d.inner - 1)/d.inner; r++) along(d, r/d.channels, r%d.channels, f);
  } else {
    #pragma omp parallel for if (d.numel > GRAIN)
    for (I o = 0; o < d.outer; o += TILE) across(d, o, d.outer, 0, d.channels, f);
  }
}

// two sums side by side, since one alone would wait for itself; sums of few terms are added to sums of sums,
// which rounds less
template<class A, class F> INLINE void summed(I count, A& sums, F step) {
  constexpr I SHORT = 128;
  if (count <= 4) { for (I i = 0; i < count; i++) step(i, sums); return; }
  for (I i = 0; i < count; ) {
    A even, odd;
    I end = least(count, i + SHORT);
    for (; i + 2 <= end; i += 2) { step(i, even); step(i + 1, odd); }
    if (i < end) step(i++, even);
    even.add(odd); sums.add(even);
  }
}
// `blocks` of sums, each one value per channel of the layout, added in pairs, which rounds less
template<class T> void add_blocks(T* parts, I blocks, I width) {
  constexpr I CHUNK = 1024;
  #pragma omp parallel for if (blocks*width > GRAIN)
  for (I left = 0; left < width; left += CHUNK)
    for (I step = 1; step < blocks; step *= 2) for (I b = 0; b + step < blocks; b += 2*step) {
      T *to = parts + b*width, *from = to + step*width;
      for (I i = left; i < least(width, left + CHUNK); i++) to[i] += from[i];
    }
}
// f(strip, sums) for the same strips, where the lanes of A are sums; of each a value per parameter into `sums`,
// after finish(all the sums, one per channel of the layout); false where memory is short
template<class T, class A, bool ROWS, class F, class G>
INLINE bool summed_strips(const Shape<ROWS>& d, T* const sums[], F f, G finish) {
  constexpr I SUMS = sizeof(A)/sizeof(V<T>);
  I channels = d.channels, outer = d.outer; // blocks depend on no number of threads, so neither do the sums
  I block = ROWS ? most(1, 1024/d.inner) : most(16, (outer + 63)/64), blocks = (outer + block - 1)/block;
  Buffer<T> parts(blocks*SUMS*channels);
  if (!parts) return false;
  if constexpr (ROWS) {
    #pragma omp parallel for if (d.numel > GRAIN)
    for (I t = 0; t < blocks*channels; t++) {
      I ch = t%channels, begin = t/channels*block;
      A s;
      for (I o = begin; o < least(outer, begin + block); o++)
        along(d, o, ch, [&](const Strip<ROWS>& strip) INLINED { f(strip, s); });
      for (I j = 0; j < SUMS; j++) parts.at[(t/channels*SUMS + j)*channels + ch] = total<T>(((V<T>*)&s)[j]);
    }
  } else {
    I wide = (channels + WIDE - 1)/WIDE;
    #pragma omp parallel for if (d.numel > GRAIN)
    for (I t = 0; t < blocks*wide; t++) {
      I begin = t/wide*block, end = least(outer, begin + block);
      I left = t%wide*WIDE, right = least(channels, left + WIDE);
      T* q = parts.at + t/wide*SUMS*channels;
      for (I j = 0; j < SUMS; j++) memset(q + j*channels + left, 0, (right - left)*sizeof(T));
      for (I o = begin; o < end; o += TILE) across(d, o, end, left, right, [&](const Strip<ROWS>& strip) INLINED {
        A s;
        for (I j = 0; j < SUMS; j++) ((V<T>*)&s)[j] = load(q + j*channels + strip.ch, strip.k);
        f(strip, s);
        for (I j = 0; j < SUMS; j++) store(q + j*channels + strip.ch, ((V<T>*)&s)[j], strip.k);
      });
    }
  }
  add_blocks(parts.at, blocks, SUMS*channels);
  finish(parts.at);
  for (I j = 0; j < SUMS; j++) for (I i = 0; i < channels/d.repeat; i++) {
    double sum = 0;
    for (I r = 0; r < d.repeat; r++) sum += parts.at[j*channels + i*d.repeat + r];
    sums[j][i] = sum;
  }
  return true;
}

// == passes
template<class S> struct Params { // one value per channel of the layout, rounded as activations are
  const C<S> *leak, *sub, *maxv;
  bool given;
  Buffer<C<S>> own;
  explicit Params(const Call& a) : given(a.repeat == 1 && sizeof(S) == sizeof(C<S>)), own(given ? 0 : 3*a.channels) {
    const void* from[] = {a.leak, a.sub, a.maxv};
    const C<S>* to[3];
    for (I j = 0; j < 3; j++) {
      const C<S>* values = (const C<S>*)from[j];
      to[j] = given ? values : own.at + j*a.channels;
      if (given || !own) continue;
      for (I i = 0; i < a.channels/a.repeat; i++) {
        C<S> v = rounded<S>(all(values[i]))[0], *first = own.at + j*a.channels + i*a.repeat;
        for (I r = 0; r < a.repeat; r++) first[r] = v;
      }
    }
    leak = to[0]; sub = to[1]; maxv = to[2];
  }
  explicit operator bool() const { return bool(own); }
  template<bool ROWS> INLINE Curve<C<S>> curve(const Strip<ROWS>& s) const {
    return Curve<C<S>>(s.value(leak), s.value(sub), s.value(maxv));
  }
};

template<class S> INLINE uint8_t forward_group(const S* x, S* y, I k, const Curve<C<S>>& c) {
  V<C<S>> v = load(x, k);
  store_exact(y, c.capped(rounded<S>(c.shifted(v))), k);
  return pack<C<S>>(v > 0);
}
template<class S, bool SIGNS, bool ROWS>
INLINE void forward_strip(const S* x, S* y, uint8_t* signs, const Strip<ROWS>& s, const Curve<C<S>>& c) {
  I i = 0, step = s.step(), at = s.at();
  x += at; y += at;
  if constexpr (SIGNS) {
    I apart = s.signs_step();
    signs += s.signs();
    if (apart == 1) for (; i + 4 <= s.count; i += 4) { // four bytes in one store
      uint32_t four = 0;
      for (I j = 0; j < 4; j++) four |= uint32_t(forward_group(x + (i + j)*step, y + (i + j)*step, s.k, c)) << 8*j;
      memcpy(signs + i, &four, 4);
    }
    for (; i < s.count; i++) signs[i*apart] = forward_group(x + i*step, y + i*step, s.k, c);
  } else for (; i < s.count; i++) forward_group(x + i*step, y + i*step, s.k, c);
}
template<class S, bool SIGNS, bool ROWS> void forward_all(const Call& a, const Params<S>& p) {
  const S* x = (const S*)a.x;
  S* y = (S*)a.y;
  uint8_t* signs = (uint8_t*)a.signs;
  strips(Shape<ROWS>(a), [=, &p](const Strip<ROWS>& s) INLINED {
    forward_strip<S, SIGNS>(x, y, signs, s, p.curve(s));
  });
}
template<class S> I forward(const Call& a) {
  Params<S> p(a);
  if (!p) return 1;
  if (a.inner > 1) a.signs ? forward_all<S, true, true>(a, p) : forward_all<S, false, true>(a, p);
  else a.signs ? forward_all<S, true, false>(a, p) : forward_all<S, false, false>(a, p);
  return 0;
}

INLINE I place(const Call& a, I i, I channel) { // of a channel in what was kept; -1 where it was not
  return a.slot ? ((const I*)a.slot)[i] : a.y ? -1 : channel;
}
template<class S, bool ROWS> bool backward_all(const Call& a, const Params<S>& p, C<S>* const sums[]) {
  using T = C<S>;
  const S *g = (const S*)a.g, *y = (const S*)a.y, *x = (const S*)a.kept;
  S* dx = (S*)a.dx;
  const uint8_t* signs = (const uint8_t*)a.signs;
  auto strip = [=, &a, &p](const Strip<ROWS>& s, Sums<T>& sums) INLINED {
    Curve<T> c = p.curve(s);
    I step = s.step(), at = s.at(), k = s.k, found = place(a, ROWS ? s.ch : s.ch/W, s.ch);
    if (found < 0) {
      I first = s.signs(), apart = s.signs_step();
      summed(s.count, sums, [=, &c](I i, Sums<T>& sums) INLINED {
        Mask<T> positive = unpack<T>(signs[first + i*apart]);
        store(dx + at + i*step, from_output(c, load(y + at + i*step, k), positive, load(g + at + i*step, k), sums), k);
      });
    } else {
      I first = s.kept(found), apart = s.kept_step();
      summed(s.count, sums, [=, &c](I i, Sums<T>& sums) INLINED {
        V<T> v = load(x + first + i*apart, k);
        store(dx + at + i*step, from_input(c, v, rounded<S>(c.shifted(v)), load(g + at + i*step, k), sums), k);
      });
    }
  };
  return summed_strips<T, Sums<T>>(Shape<ROWS>(a), sums, strip, [&](T* dleak) {
    for (I ch = 0; ch < a.channels; ch++) if (place(a, ROWS ? ch : ch/W, ch) < 0) dleak[ch] /= p.leak[ch];
  });
}
template<class S> I backward(const Call& a) {
  Params<S> p(a);
  if (!p) return 1;
  C<S>* const sums[] = {(C<S>*)a.dleak, (C<S>*)a.dsub, (C<S>*)a.dmaxv};
  return !(a.inner > 1 ? backward_all<S, true>(a, p, sums) : backward_all<S, false>(a, p, sums));
}

// where the division by `leak` would lose too much: how many of `channels` values, and in `signs`, if given, which
template<class S> I lost(const Call& a) {
  const double eps = sizeof(S) == sizeof(C<S>) ? std::numeric_limits<C<S>>::epsilon() : 1./128;
  I n = 0;
  for (I i = 0; i < a.channels/most(a.repeat, 1); i++) {
    double l = ((const C<S>*)a.leak)[i], s = ((const C<S>*)a.sub)[i], m = a.maxv ? ((const C<S>*)a.maxv)[i] : 0;
    bool one = !(l >= 1./1024 && l >= (s < 0 ? -s : s)*eps*1024 && m == m);
    if (a.signs) ((bool*)a.signs)[i] = one;
    n += one;
  }
  return n;
}

// == norm
template<class T> struct Norm { // one value of each per channel of the layout
  enum Kind { LEAK, SUB, MAXV, MEAN, SCALE, SHIFT, OF_H, OF_X, REST, COUNT };
  Buffer<T> values; I channels, repeat;
  explicit Norm(const Call& a) : values(COUNT*a.channels), channels(a.channels), repeat(a.repeat) {
    if (!values) return;
    auto of = [](void* p, I i, T otherwise) { return p ? ((const T*)p)[i] : otherwise; };
    for (I i = 0; i < channels/repeat; i++) {
      T mean = of(a.mean, i, 0), scale = invstd(of(a.var, i, 0), a.eps)*of(a.weight, i, 1);
      set(LEAK, i, of(a.leak, i, 0)); set(SUB, i, of(a.sub, i, 0)); set(MAXV, i, of(a.maxv, i, 0));
      set(MEAN, i, mean); set(SCALE, i, scale); set(SHIFT, i, of(a.bias, i, 0) - mean*scale);
    }
  }
  explicit operator bool() const { return bool(values); }
  static T invstd(double var, double eps) { return var == 0 && eps == 0 ? 0 : 1/__builtin_sqrt(var + eps); }
  T get(Kind kind, I i) const { return values.at[kind*channels + i*repeat]; }
  void set(Kind kind, I i, T v) { for (I r = 0; r < repeat; r++) values.at[kind*channels + i*repeat + r] = v; }
  template<bool ROWS> INLINE V<T> at(Kind kind, const Strip<ROWS>& s) const {
    return s.value(values.at + kind*channels);
  }
  template<bool ROWS> INLINE Curve<T> curve(const Strip<ROWS>& s) const {
    return Curve<T>(at(LEAK, s), at(SUB, s), at(MAXV, s));
  }
};
template<class T> struct Moments {
  V<T> first{}, second{};
  INLINE void add(const Moments& o) { first += o.first; second += o.second; }
};
template<class T> struct NormSums : Sums<T> { // and of the gradient of h: alone, and times x - mean
  V<T> h{}, hx{};
  INLINE void add(const NormSums& o) { Sums<T>::add(o); h += o.h; hx += o.hx; }
};

// the mean first, since squares of x would lose what a large mean leaves of them; what rounding did to it shows
// in the second pass
template<class T, bool ROWS> bool norm_stats(const Call& a) {
  Shape<ROWS> d(a);
  I num = a.channels/a.repeat;
  double count = a.numel/num;
  const T* x = (const T*)a.x;
  T *mean = (T*)a.mean, *var = (T*)a.var;
  T* const sums[] = {mean, var};
  Buffer<T> repeated(a.channels);
  auto nothing = [](T*) {};
  auto plain = [=](const Strip<ROWS>& s, Moments<T>& sums) INLINED {
    I at = s.at(), step = s.step(), k = s.k;
    summed(s.count, sums, [=](I i, Moments<T>& sums) INLINED { sums.first += load(x + at + i*step, k); });
  };
  if (!repeated || !summed_strips<T, Moments<T>>(d, sums, plain, nothing)) return false;
  for (I i = 0; i < num; i++) mean[i] /= count;
  for (I i = 0; i < num; i++) for (I r = 0; r < a.repeat; r++) repeated.at[i*a.repeat + r] = mean[i];
  auto around = [=, &repeated](const Strip<ROWS>& s, Moments<T>& sums) INLINED {
    I at = s.at(), step = s.step(), k = s.k;
    V<T> m = s.value(repeated.at);
    for (I i = k; i < W; i++) m[i] = 0; // nothing is there
    summed(s.count, sums, [=](I i, Moments<T>& sums) INLINED {
      V<T> off = load(x + at + i*step, k) - m;
      sums.first += off; sums.second += off*off;
    });
  };
  if (!summed_strips<T, Moments<T>>(d, sums, around, nothing)) return false;
  for (I i = 0; i < num; i++) {
    double off = mean[i]/count;
    mean[i] = repeated.at[i*a.repeat] + off; var[i] = var[i]/count - off*off;
  }
  return true;
}
template<class T, bool ROWS> bool norm_forward(const Call& a) {
  Norm<T> n(a);
  if (!n) return false;
  const T* x = (const T*)a.x;
  T* y = (T*)a.y;
  strips(Shape<ROWS>(a), [=, &n](const Strip<ROWS>& s) INLINED {
    Curve<T> c = n.curve(s);
    V<T> scale = n.at(n.SCALE, s), shift = n.at(n.SHIFT, s);
    I at = s.at(), step = s.step();
    for (I i = at; i < at + s.count*step; i += step)
      store(y + i, c.capped(c.shifted(load(x + i, s.k)*scale + shift)), s.k);
  });
  return true;
}
template<class T, bool ROWS> bool norm_backward(const Call& a) {
  Norm<T> n(a);
  Shape<ROWS> d(a);
  const T *g = (const T*)a.g, *x = (const T*)a.x, *var = (const T*)a.var;
  T *dx = (T*)a.dx, *dbias = (T*)a.dbias, *dweight = (T*)a.dweight;
  T* const sums[] = {(T*)a.dleak, (T*)a.dsub, (T*)a.dmaxv, dbias, dweight};
  auto strip = [=, &n](const Strip<ROWS>& s, NormSums<T>& sums) INLINED {
    Curve<T> c = n.curve(s);
    V<T> scale = n.at(n.SCALE, s), shift = n.at(n.SHIFT, s), mean = n.at(n.MEAN, s);
    I at = s.at(), step = s.step(), k = s.k;
    summed(s.count, sums, [=, &c](I i, NormSums<T>& sums) INLINED {
      V<T> v = load(x + at + i*step, k), h = v*scale + shift;
      V<T> dh = from_input(c, h, c.shifted(h), load(g + at + i*step, k), sums);
      sums.h += dh; sums.hx += dh*(v - mean);
    });
  };
  if (!n || !summed_strips<T, NormSums<T>>(d, sums, strip, [](T*) {})) return false;
  I num = a.channels/a.repeat;
  for (I i = 0; i < num; i++) {
    T scale = n.get(n.SCALE, i), invstd = n.invstd(var[i], a.eps), share = a.training ? scale*num/a.numel : 0;
    n.set(n.OF_H, i, scale); n.set(n.OF_X, i, -share*invstd*invstd*dweight[i]); n.set(n.REST, i, -share*dbias[i]);
    dweight[i] *= invstd;
  }
  strips(d, [=, &n](const Strip<ROWS>& s) INLINED {
    Curve<T> c = n.curve(s);
    V<T> scale = n.at(n.SCALE, s), shift = n.at(n.SHIFT, s), mean = n.at(n.MEAN, s);
    V<T> of_h = n.at(n.OF_H, s), of_x = n.at(n.OF_X, s), rest = n.at(n.REST, s);
    I at = s.at(), step = s.step();
    for (I i = at; i < at + s.count*step; i += step) {
      Sums<T> none;
      V<T> v = load(x + i, s.k), h = v*scale + shift, dh = from_input(c, h, c.shifted(h), load(g + i, s.k), none);
      store(dx + i, dh*of_h + ((v - mean)*of_x + rest), s.k);
    }
  });
  return true;
}

// == names
#define EXPORT(S) \
  extern "C" I lost_##S(const Call* a) { return lost<S>(*a); } \
  extern "C" I forward_##S(const Call* a) { return forward<S>(*a); } \
  extern "C" I backward_##S(const Call* a) { return backward<S>(*a); }
#define EXPORT_NORM(T, NAME) \
  extern "C" I NAME##_##T(const Call* a) { return !(a->inner > 1 ? NAME<T, true>(*a) : NAME<T, false>(*a)); }
EXPORT(float)
EXPORT(double)
EXPORT(bfloat16)
EXPORT_NORM(float, norm_stats)
EXPORT_NORM(float, norm_forward)
EXPORT_NORM(float, norm_backward)
EXPORT_NORM(double, norm_stats)
EXPORT_NORM(double, norm_forward)
EXPORT_NORM(double, norm_backward)
